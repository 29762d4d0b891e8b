"""The document's fixed words: what the sections are called and how things were measured."""

MARK = "<!-- Written by scripts/bench/run.py from its record; do not edit, `run.py render` renews it. -->"

METHOD = """\
- **Same work.** All programs get the same Q8_0 GGUF; Krasis gets the bundle that `krasis-convert` made
  of it, without loss for the experts; attention and output head are INT8, one scale a row. Same
  machine, same number of threads, same token counts.
- **Interleaved.** A round runs every program once, one process at a time; each round begins with
  another program. A round counts by the median of its samples. Ratios are taken inside a round. Tables
  show the median over rounds and, in brackets, the smallest and the largest.
- **As llama-bench counts.** ppN: tokens/s of one prompt of N random ids into an empty context. tgN:
  tokens/s of N random ids, one by one, from an empty context. Loading and repacking are not counted.
- **Read bandwidth** is measured by Krasis beside each of its samples, over the same memory with the
  same threads.
- **Errors are results.** A program that cannot run stands in its table with its own words.
- Loads (`/proc/loadavg` before a run) are in the record; the largest of each stage is given below. The
  benchmark's own runs raise it to about the number of threads."""

TITLES = {
    "decode": "Decode",
    "prefill": "Prefill on the CPU",
    "layer": "One MoE layer against kt-kernel",
    "contention": "Decode on busy cores",
    "convert": "Conversion",
    "quality": "Quality of the formats",
    "hybrid": "With GPUs",
    "families": "Other families",
}

INTRODUCTIONS = {
    "decode": """\
Whole models, one token after another. GB/s: the weights that Krasis reads for a token, by its
speed.""",
    "prefill": """\
Whole models, no GPU. Krasis takes the prompt in one pass, the peers in physical batches of 512.""",
    "layer": """\
The routed experts of one layer, one token a call, without the rest of a model; every program gets the same
weights, tokens and routings, drawn anew for every token. kt-kernel runs its own classes, set up as its Python
package does it. Errors are of the layer's result, against float64 on the same weights. Bits a weight, scales
included: krasis 8.5 and 4.5, q8_0 8.5, rawint4 4.5, rawint4-g128 4.125, amxint8 8, amxint4 4. Rows of krasis
include quantising the token and all of Python; "krasis kernels" is krasis_moe alone, call after call. Shares
are of the read bandwidth that the same threads measured before and after each sample.""",
    "contention": """\
The same decode, alone and beside one spinning process held to each core: half of every core is its share.""",
    "convert": """\
BF16 to four bits. llama-quantize reads a BF16 GGUF of the same weights; both inputs are in the page
cache. Krasis also makes checksums and waits for the disk (fsync); llama-quantize leaves its output in
the page cache. Errors are over the same sampled experts of every layer, against BF16.""",
    "quality": """\
The trained model of the tests on every second window of 512 tokens of its held-out text. Each format is
dequantised into the same transformers model in float32; divergence is from the BF16 model, averaged
over all positions. Some rows of that model are shorter than a block of Q4_K; there llama-quantize takes
a larger type: see bits per weight.""",
    "hybrid": """\
A prompt of N tokens goes through the GPUs in one batch, and every expert comes from host memory: Krasis gets
no more GPU memory than that takes, llama.cpp keeps all experts in RAM (-ncmoe) and copies them. Decode has
attention and the rest on the GPUs, experts on the CPU. Krasis prefills with INT4 experts (its GPU tier) in
both forms and decodes with the bits named; llama.cpp has one file for both.""",
    "families": """\
Layers of real size, fewer of them and of their experts (as many serve a token), with random weights: the same
GGUF for all programs. Each program runs all cases of a round in one process. Krasis takes a prompt in one
pass, the peers in physical batches of 512. llama.cpp repacks weights (AMX), but not
those of deepseek-v3: with latent attention it aborts. GB/s: the weights that Krasis reads for a token, by its
speed.""",
}
