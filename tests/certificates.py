"""What certificates do tests of TLS use?

Made on the spot by `openssl`, valid for a day: an authority, and a certificate that it signed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from dask_ep.cluster.checks import Certificates


def make_certificates(directory: Path) -> Certificates:
    """Make an authority and one certificate that it signed, as files in `directory`."""
    ca, cert, key, ca_key, request = (
        str(directory / f"{name}.pem") for name in ("ca", "cert", "key", "ca-key", "request")
    )
    a_new_key = ["req", "-newkey", "rsa:2048", "-nodes"]
    _openssl(*a_new_key, "-x509", "-days", "1", "-subj", "/CN=authority", "-keyout", ca_key,
             "-out", ca)  # fmt: skip
    _openssl(*a_new_key, "-subj", "/CN=localhost", "-keyout", key, "-out", request)
    _openssl("x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial",
             "-days", "1", "-out", cert)  # fmt: skip
    return Certificates(ca, cert, key)


def options(certificates: Certificates) -> list[str]:
    """What the commands of Dask and of this package are told."""
    return [
        *("--tls-ca-file", certificates.ca_file),
        *("--tls-cert", certificates.cert),
        *("--tls-key", certificates.key),
    ]


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
