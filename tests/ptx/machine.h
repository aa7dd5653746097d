// The instructions of PTX on a CPU, as the PTX ISA (9.0) says: what translate.py writes calls these.
//
// Registers hold raw bits. Generic and global addresses are the host's own; shared ones count from kSharedStart in the
// block's memory, which also tells the two apart. Every access to shared memory is checked for bounds and alignment,
// every other for alignment. The approximate instructions return what the ISA allows, not the exact value: the result
// is moved by up to their documented error, the same way for the same bits.
#pragma once

#include "machine_warpgroup.h"
