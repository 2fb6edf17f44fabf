"""State on disk that is complete or absent: saving, loading on any layout, pruning, and Hugging Face weights.

save.py          what each rank writes, and the commit that makes all of it visible at once
background.py    saving behind the training, as a rank does it: a copy into shared memory (staging.py)
saver.py         the process beside a rank that saves what is there
load.py          reading any box of any tensor, with every byte verified
manifest.py      the record of what a checkpoint holds
tensor_file.py   safetensors files, written as a stream that is hashed on its way to the disk (hashing.py)
place.py         where checkpoints stand: paths and URLs
store.py         what all of this needs of such a place; local_store.py is a folder, object_store.py an object store (objects.py)
retain.py        which checkpoints are kept, and removing the others by hand
verify.py        reading every byte, to name what is damaged
compare.py       how two checkpoints differ
reshard.py       rewriting one so that other ranks have files of their own
inspect.py       what stands in a folder of checkpoints
hf.py            Hugging Face weights, in and out
hf_source.py     reading Hugging Face folders
torch_source.py  reading torch's own files, which are pickles, without running anything in them
dcp_metadata.py  the one pickle of those that torch's restricted loader does not read
weights_source.py  weights to start from, by the box: ours or Hugging Face's
ranks.py         what saving needs of the other processes
config.py        when to save and what to keep
"""
