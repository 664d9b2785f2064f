"""Video files in, clips out: our index, the seeded sampler, the DALI loader, and writers.

`index` what a data set is; `indexing` makes one; `inspection` judges a file; `sampler` chooses
clips; `pipeline`, `decoding` and `loader` turn the choice into tensors; `procedural` makes the
sample data set; `writing` makes mp4s and contact sheets.
"""
