"""This project: one call that reads, quantizes and writes, so all of it counts as quantizing."""

from awq_core import QuantConfig, quantize
from peers.job import Job


def main() -> None:
    job = Job.read("awq-core")
    windows = job.windows()
    config = QuantConfig(group_size=job.group_size, **job.options)
    with job.phase("quantize"):
        quantize(job.source, job.out, config=config, calibration=windows, samples=len(windows), seq_len=len(windows[0]))


if __name__ == "__main__":
    main()
