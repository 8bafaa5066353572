// All but the kernels as one translation unit: most of the time of compiling goes into the standard headers.
#include "dispatch.cpp"
#include "memory.cpp"
#include "pool.cpp"
#include "segments.cpp"
#include "unique.cpp"
#include "rows.cpp"
#include "storage.cpp"
#include "interface.cpp"
