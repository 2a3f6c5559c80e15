"""The checkpoint format, numpy only: generator, masks, recipe schema, container, rebuild.

Nothing in this package imports torch. docs/format.md is the normative text.

Modules import only those above them in this list:

    canonical    canonical JSON, hexadecimal floats, digests
    generator    bits -> signs, normals, uniforms
    tensors      dtypes, raw tensors, rounding to 16 bits
    masks        packed bit masks and their two encodings
    hadamard     the hadamard source
    fields       what fields of the schema may hold
    specs        the schema: what describes, and makes no tensor
    recipe       the schema: sources, overlays, entries, members
    recognise    what a file is by its content, and what is no checkpoint
    container    safetensors headers and payloads, read strictly and written atomically
    derivation   what makes one tensor: its source and steps, and where their payloads lie
    rebuild      a derivation and its payloads -> a finished tensor
    checkpoint   a recipe with its payloads and bases: opened, read, rebuilt
    shards       weights in several files, folders of weights
    writing      a checkpoint to a file, and a file held against its digests
    members      members moved between files: picked, renamed, grafted
"""
