"""Data, the training loop and evaluation. No command line, no printing.

Modules import only those above them in this list:

settings      what a run is: resolved numbers
catalogue     the datasets that are known by name: defaults, and how their images look
images        image files: finding, reading, and what to say of those that cannot be read
augmentation  what is drawn for an image in training, by (seed, epoch, image)
data          splits: batches of images on the device
scan          what lies in a folder
labels        a table of images and their classes
layouts       class folders, Tiny-ImageNet, or images with labels.csv
folders       a folder -> its splits, or one line of what is wrong with it
datasets      datasets by name, folder or image files -> splits
evaluate      accuracy and loss of a module on a split
predict       what a module says of each image of a split
uncertainty   accuracy, calibration and uncertainty of probabilities, also of an ensemble's
temperature   one that fits probabilities to labels
state         the whole state of a run as one object
averaging     copies of what is learned, and its moving average
optimisation  optimiser and schedule, and what can be known of them beforehand
loop          the one training loop
"""
