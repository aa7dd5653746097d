"""Other people's energies: which of them are an MLP, where its parameters are, and whether that still holds.

At every call a sampler asks for the MLP that its energy is (`energy_source.py`). The files, in the order in which the
call comes to them; 2 to 5 only where 1 knows of no finding that still holds:

    1  examining     the door and the memory: what was found of a module, or what an examination (2 to 5) finds now
       twins         … copies of a module to be examined
       watching      whether everything that the finding was read from is still as it was
       snapshots     … how that is compared: by value, or at once by the very objects

    2  blind_spots   what the forward's code looks at and nobody can watch: then it gets no structure, only a plan
       observing     a float64 copy of the module runs, and every call of torch in it is seen

    3  tracing       the structure: each entry of each tensor is followed to the parameters of Linear layers
       structure     … what that gives: a label of each tensor, and of the last one where the layers stand

    4  following     where there is none, a plan: which layer each tensor is affine in, however the forward is written
       calls         … which calls of torch that understands, and what it knows of the tensors they give

    5  agreeing      tests what was found, value and gradient against the module's own: near, far out, in its own type

    6  recognised    the parameters of this very call by the structure: read where they stand in the module
       probing       … by the plan: read from a run of the forward, which shows a quadratic part beside the network too
"""
