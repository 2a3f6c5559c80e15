"""Files -> reports. Reads headers alone wherever they answer the question; never imports torch,
but for what builds a network (``verify.check_architecture``).

pictures  figures to files
confusion  which classes are told right, what the others are taken for; the matrix to a file
floats    tensors of any dtype as numbers
grouping  names in order, by block, selected by pattern
headers   what a file says of its tensors, whoever wrote it
verify    every digest of a file, or of all files in a folder
members   what each member of a file adds
storage   where a file's bytes go, against a dense file
layers    tensors and layers as a header shows them
model     the network layer by layer
curves    the records of a run, as a picture
networks  one network of a file, ours or not: its header's word, and its tensors one by one
overlap   two masks against each other, and against chance
masks     what masks keep: densities, dead filters, signs, overlap, bytes against entropy
diff      two networks: which tensors, filters and bits differ, and by how much
moments       statistics of one tensor, block by block
weight_files  any file of weights: its tensors, what was learned of them, how they were drawn
weights       the weights of networks, layer by layer
histograms    the values of one layer in bins
weight_plots  these as pictures
"""
