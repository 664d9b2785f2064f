"""Video files in, clips out.

A data set is an `index`. `indexing` makes it from `layouts` or `annotations` and the verdicts of
`inspection`, which decodes every file once: `containers` opens it, `colour` and `truncation` judge
it, and `keyframes` notes where decoding can start. `sampler` chooses clips, `decoding` takes their
frames from a file, `pyav_stream` or `dali_stream` makes batches of them, as `decoder_choice`
decides, and `loader` makes tensors. `transcoding` makes small copies of a data
set, each by `copying`; `procedural` makes the sample data set; `encoding` says how both are
encoded. `writing` and `lossless` write videos to look at and to measure. `file_pool` works on many
files in processes.
"""
