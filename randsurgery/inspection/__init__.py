"""Files -> reports. Reads headers alone wherever they answer the question; never imports torch.

storage   where a file's bytes go, against a dense file
verify    every digest of a file
members   what each member of a file adds
curves    the records of a run, as a picture
"""
