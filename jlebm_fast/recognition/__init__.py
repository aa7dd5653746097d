"""Other people's energies: which of them are an MLP, where its parameters are, and whether that still holds.

examining      whether a module is one: conjectured, tested, remembered
tracing        … by following entries to the parameters of its Linear layers (structure, recognised)
following      … by following which layer a value is affine in (calls), to a plan (probing): its forward runs at every
               call, and shows a quadratic part beside the network too
observing      what both see of a forward
watching       what may change about a module, as snapshots compare it; blind_spots, what nobody can watch
"""
