"""Train a scikit-learn model, keep it in S3, and answer from it there.

    python examples/serve_estimator.py

starts an S3 server of its own, trains on scikit-learn's 1,797 scanned digits, saves the model as .skops and as .joblib,
and loads both into memory, as a service would when it starts. It needs torch-s3[demo,sklearn].

    python examples/serve_estimator.py --model s3://bucket/digits.skops

keeps it in your bucket. Credentials are found where boto3 finds them (AWS_ACCESS_KEY_ID, AWS_PROFILE, a role …).
"""

import argparse
import sys
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from torch_s3 import S3Error
from torch_s3.artifacts import load_estimator, save_estimator
from torch_s3.errors import UnsafeArtifact
from torch_s3.testing import serve_s3

GOAL = 0.95  # the test accuracy that the digits must reach


class Service:
    """Answers from a model that is loaded once.

    Args:
        uri: Of the model.
        **where: What `load_estimator` needs to get there.
    """

    def __init__(self, uri: str, **where: Any) -> None:
        self._model = load_estimator(uri, **where)

    def digits(self, scans: Any) -> list[int]:
        """What is written on scans of 8 x 8 pixels."""
        return [int(digit) for digit in self._model.predict(np.reshape(scans, (-1, 64)))]


def run(uri: str, **where: Any) -> None:
    """Train, save, load, and answer."""
    images, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(images, digits, random_state=0)
    model = make_pipeline(StandardScaler(), SVC()).fit(train_x, train_y)

    save_estimator(model, uri, **where)
    service = Service(uri, **where)
    accuracy = np.mean(np.array(service.digits(test_x)) == test_y)
    print(f"{uri}: {accuracy:.1%} of {len(test_y)} digits read right; the first are {service.digits(test_x[:10])}")
    if accuracy < GOAL:
        sys.exit(f"that misses the goal of {GOAL:.0%}")


def refused(uri: str, **where: Any) -> None:
    """Show what becomes of a pickle that nobody has vouched for."""
    try:
        Service(uri, **where)
    except UnsafeArtifact as error:
        print(f"{uri} without trusted= is refused. It asks for:", *error.asks_for, sep="\n  ")
    else:
        sys.exit(f"{uri} was loaded, although nothing was trusted")


def demo() -> None:
    """Both formats, in an S3 of our own."""
    with serve_s3() as s3:
        bucket = s3.create_bucket("models")
        where: dict[str, Any] = {"storage_options": s3.storage_options}
        run(f"{bucket}/digits.skops", **where)
        images, digits = load_digits(return_X_y=True)
        save_estimator(SVC().fit(images, digits), f"{bucket}/digits.joblib", compress="lz4", **where)
        refused(f"{bucket}/digits.joblib", **where)
        service = Service(f"{bucket}/digits.joblib", trusted=["sklearn"], **where)
        print(f"{bucket}/digits.joblib with trusted=['sklearn']: the first are {service.digits(images[:10])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="URI", help="where the model is kept: s3://….skops")
    options = parser.parse_args()
    try:
        if options.model is None:
            demo()
        else:
            run(options.model)
    except S3Error as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
