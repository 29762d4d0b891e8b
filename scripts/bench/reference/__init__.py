"""Stage ``reference``: one very large model at full depth, a long prompt, few small GPUs, beside the peers.

files       what is made: bundles and GGUFs of random weights, in memory, as many layers as fit
rows        what is run: a program, its flags, the cards it may use
watch       memory of the host and of the GPUs while a program runs, and when it says what
work        the steps in their order, resumed where an earlier call stopped
kt_floor    what kt-kernel's parts alone take
findings    what the table and the conclusions ask of the record
section     the part of the document; conclusions, chart: its sentences and its picture
"""
