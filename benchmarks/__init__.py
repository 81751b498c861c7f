"""Speed against named rivals: ``python -m benchmarks`` compares them, interleaved."""
