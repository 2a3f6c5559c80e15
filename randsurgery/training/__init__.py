"""Data, the training loop and evaluation. No command line, no printing.

Modules import only those above them in this list:

settings     what a run is: resolved numbers, defaults per dataset
images       image files: finding, reading, and what to say of those that cannot be read
data         splits: batches of images on the device
datasets     datasets by name, folder or image files -> splits
evaluate     accuracy and loss of a module on a split
predict      what a module says of each image of a split
uncertainty  accuracy, calibration and uncertainty of probabilities, also of an ensemble's
temperature  one that fits probabilities to labels
state        the whole state of a run as one object
loop         the one training loop
"""
