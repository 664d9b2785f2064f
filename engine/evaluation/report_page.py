"""The template of an evaluation's HTML page; `engine.evaluation.html_report` fills it in."""

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation of generated videos</title><style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
       padding: 0 1rem; color: #222; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; text-align: right; }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left; }
tr + tr { border-top: 1px solid #ddd; } small, .range { color: #666; } .blind { color: #b30000; }
.range { white-space: nowrap; font-size: 85%; }
#metrics td:last-child { min-width: 12rem; }
.plain td { text-align: left; overflow-wrap: anywhere; vertical-align: top; }
.plain td:first-child { white-space: nowrap; }
pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
</style></head><body>
<h1>Evaluation of generated videos</h1>
<pre>{{ header }}</pre>
<div class="wide"><table id="metrics">
<tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><td>{{ row.name }}</td>
{% for cell in row.cells %}
<td>{{ cell.value }}<br><span class="range">{{ cell.range }}</span></td>
{% endfor %}
<td{% if row.blind %} class="blind"{% endif %}>{{ row.note }}</td></tr>
{% endfor %}
</table></div>
<p>{% for line in legend %}<small>{{ line }}</small><br>{% endfor %}</p>
{% if clips %}
<h2>Clips</h2>
<img id="clips" alt="real, generated and spoilt clips" src="{{ clips }}">
<p><small>At most the first {{ most_frames }} frames.</small></p>
{% endif %}
{% if classes %}
<h2>Class by class</h2>
<p><small>Generated clips of a class against all of its real ones.</small></p>
<div class="wide"><table id="classes"><tr><th>class</th><th>real</th><th>generated</th>
{% for name in metrics %}<th>{{ name }}</th>{% endfor %}<th></th></tr>
{% for each in classes %}
<tr><td>{{ each.name }}</td><td>{{ each.num_real }}</td><td>{{ each.num_generated }}</td>
{% for cell in each.cells %}
<td>{{ cell.value }}<br><span class="range">{{ cell.range }}</span></td>
{% endfor %}
<td></td></tr>
{% endfor %}
</table></div>
{% endif %}
{% if spectra %}
<h2>Power spectra</h2>
<img id="spectra" alt="power spectra by radius" src="{{ spectra }}">
<p><small>Mean of {{ num_sets }} sets of clips; the band is their standard deviation.</small></p>
{% endif %}
{% if curves %}
<h2>Training</h2>
<img id="curves" alt="losses and figures in the course of training" src="{{ curves }}">
{% endif %}
<h2>Protocol</h2>
<table class="plain" id="protocol">
{% for key, value in protocol %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% if trained %}
<h2>Configuration</h2>
<p>{{ trained.path }}: stage {{ trained.stage_number }} after {{ trained.step }} updates</p>
<details><summary>all keys</summary><pre id="configuration">{{ configuration }}</pre></details>
{% endif %}
<h2>Environment</h2>
<table class="plain" id="environment">
{% for key, value in environment.items() %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
</body></html>
"""
