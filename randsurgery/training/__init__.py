"""Data, the training loop and evaluation. No command line, no printing.

settings   what a run is: resolved numbers, defaults per dataset
data       datasets by name or folder -> batches on the device
state      the whole state of a run as one object
loop       the one training loop
evaluate   accuracy and loss of a module on a split
"""
