"""Files -> reports. Reads headers alone wherever they answer the question; never imports torch.

storage       where a file's bytes go, against a dense file
verify        every digest of a file
members       what each member of a file adds
curves        the records of a run, as a picture
moments       statistics of one tensor, block by block
weight_files  any file of weights: its tensors, what was learned of them, how they were drawn
weights       the weights of networks, layer by layer
histograms    the values of one layer in bins
weight_plots  these as pictures
"""
