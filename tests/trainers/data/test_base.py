import hashlib

import torch

from trainers.data.base import fingerprint, generator


def test_generators_depend_on_all_three_arguments():
    def draw(*key):
        return tuple(torch.randint(2**62, (2,), generator=generator(*key)).tolist())

    keys = [(seed, stream, index) for seed in range(5) for stream in ("a", "b") for index in range(50)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(0, "a", 1) == draw(0, "a", 1)
    # Not a function of seed + index or of the digits written together.
    assert draw(1, "a", 2) != draw(2, "a", 1)
    assert draw(1, "1/a", 2) != draw(11, "a", 2)


def test_fingerprints_by_hand():
    assert fingerprint(["ab"]) == hashlib.sha256(b"str 2 ab").hexdigest()
    data = torch.tensor([1, 2], dtype=torch.uint8)
    assert fingerprint([data]) == hashlib.sha256(b"torch.uint8 (2,)\x01\x02").hexdigest()


def test_fingerprints_tell_apart():
    data = torch.arange(6)
    parts = [
        [data],
        [data.int()],
        [data.view(2, 3)],
        [data.flip(0)],
        [data[:3], data[3:]],
        ["a", "b"],
        ["ab"],
        ["b", "a"],
    ]
    assert len({fingerprint(part) for part in parts}) == len(parts)
    assert fingerprint([data.view(2, 3).T]) == fingerprint([data.view(2, 3).T.contiguous()])
