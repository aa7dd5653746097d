"""The kernels of backend `triton`, imported when the first is launched: importing jlebm_fast needs no Triton."""
