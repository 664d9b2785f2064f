"""Video files in, clips out.

What a data set is: `index`, made by `indexing` from `layouts` or `annotations` and the verdicts of
`inspection`, which decodes every file once (`containers` opens it, `colour` and `truncation` judge
it, `keyframes` notes where decoding can start). Clips of it: `sampler` chooses them, `decoding`
takes the frames from a file, `pyav_stream` or `dali_stream` makes batches of them, as
`decoder_choice` decides, and `loader` makes tensors. `transcoding` makes small copies of a data set,
each by `copying`, and `procedural` the sample data set, both as `encoding` says; `writing` and
`lossless` write videos. `file_pool` works on many files in processes.
"""
