"""Benchmarks of fused_la: commands at the top, `timing` for what runs on a device, `static` for what only compiles.

    python -m benchmarks              time and memory of every provider on a selection of cases (`timing`)
    python -m benchmarks host         host time, launches and compiled kernels of a step, without a GPU (`static.host`)
    python -m benchmarks.disassemble  registers, memory accesses and instructions of compiled kernels (`static`)
    python -m benchmarks.parallel     a head whose classes are spread over ranks: time, memory and bytes sent
    bash benchmarks/on_gpu.sh         every check that needs a GPU, in a few minutes (`on_gpu`; first stage: `accuracy`)
    pytest benchmarks/bench_loss.py   forward + backward of every provider with pytest-benchmark

In `static` only `host` imports from `timing` (cases, providers, machine, report); `timing` imports nothing of `static`.
`pytest` without a path runs no benchmark.
"""
