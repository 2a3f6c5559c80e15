"""Whole jobs, as the command line runs them: source -> recipe -> module -> fit -> harvest -> file.

A job is resolved into a frozen plan first; every input is checked before anything is trained,
and nothing is written before the result is complete.

Modules import only those above them in this list:

    hub       files from the Hugging Face Hub
    sources   where a network comes from: an architecture, dense weights, a file
    holdout   training images held out to validate on, and known again
    splits    which images it sees: splits, what is held out of them, their classes
    inputs    how it sees them: dataset, preprocessing, device
    networks  a network to be used as it is: a file, or dense weights of an architecture
    settling  the settings of training: defaults under what was given
    records   what is written beside the weights: provenance, metrics, downloaded bases
    preparing  what a training job is told, checked
    runs      what all training jobs share: train, write, say what was done
    onnx      a network as an ONNX file
    fixed_masks  masks of another file, or chosen anew from scores, as methods
    methods   the ways to find masks that popup knows
    init, freeze, popup, train, evaluate, predict, export, convert   one module a command
    parts     the folder in which a build keeps its members
    build     ensembles: members trained one after another
    members   members moved between files
    ensembles   members together on a dataset
"""
