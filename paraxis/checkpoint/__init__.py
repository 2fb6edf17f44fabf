"""State on disk that is complete or absent: saving, loading on any layout, pruning, and Hugging Face weights.

save.py          what each rank writes, and the commit that makes all of it visible at once
load.py          reading any box of any tensor, with every byte verified
manifest.py      the record of what a checkpoint holds
tensor_file.py   safetensors files, written as a stream that is hashed on its way to the disk
store.py         names and durable operations of the folder that holds the checkpoints
retain.py        which checkpoints are kept, and removing the others by hand
verify.py        reading every byte, to name what is damaged
compare.py       how two checkpoints differ
reshard.py       rewriting one so that other ranks have files of their own
inspect.py       what stands in a folder of checkpoints
hf.py            Hugging Face weights, in and out
ranks.py         what saving needs of the other processes
config.py        when to save and what to keep
"""
