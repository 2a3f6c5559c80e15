"""Work on nn.Module: no command line, no printing, no files but base checkpoints.

Modules import only those above them in this list:

tensors        torch tensors <-> raw tensors of the format
arguments      what callers of the library pass
dtypes         modules in other dtypes than their file's: what is stored
randomness     torch's own generators, borrowed and given back
sentences      values -> sources and overlays, with their payloads
networks       the CIFAR networks of partial training, and LeNet-300-100, as modules
zoo            the papers' architectures, entered in timm's registry
architectures  registry names and arguments -> modules, checked before anything is allocated
roles          what each tensor of a module is; patterns that select modules
initialisers   the papers' weight distributions -> random sources
method         what a way to find masks is: one object, its options as fields
pickles        what torch.save wrote, read without running a line of it
checkpoints    what training programs write: where the weights lie, what stands before their names
bases          dense checkpoints to build on, opened
adaptation     dense weights for images of another size or other channels
heads          fixed classifiers
recipes        module -> recipe, on a base too
plans          what is to be learned: fractions, layers, norms, the classifier
threshold      the exact top-k selection of edge-popup
masking        the parametrization that masks a weight by its scores
scores         scores on weights: attach them, harvest masks
popup_scores   scores of edge-popup: their masks and gradient
supermask_scores  scores of supermasks: the masks they draw
sliced_layers  plain layers of which a slice is learned: its gradient alone
slices         partial training: attach a plan to a module
modules        recipe -> module, module -> recipe
edge_popup     edge-popup (Ramanujan et al.), a method
supermask      supermasks (Zhou et al.), a method
learning       plans on modules that were built from files
tickets        masks on other weights, masks chosen anew from scores
foreign        state dicts of other programs under an architecture's names and shapes
hidden_networks  checkpoints of Ramanujan et al.'s code: their scores -> masks
differences    a dense checkpoint against a base
resident       one network that becomes each of a file's members in turn
ensembles      members over one backbone, in turn or held side by side
"""
