import pytest

from trainers.data.documents import Document, cut, split_documents, take


def corpus(size=400, domains=("a", "b")):
    return [Document(f"text {d} {i}", d, f"{d}/{i}") for d in domains for i in range(size)]


def keys(documents):
    return {(d.domain, d.name) for d in documents}


def test_split_is_a_partition_by_document():
    documents = corpus()
    train, valid = split_documents(documents, 0.2)
    assert keys(train).isdisjoint(keys(valid))
    assert keys(train) | keys(valid) == keys(documents)
    assert [d for d in documents if d in set(train)] == train


def test_split_holds_out_the_fraction_in_every_domain():
    _, valid = split_documents(corpus(), 0.2)
    for domain in ("a", "b"):
        # 400 draws of probability 0.2: 80 ± 4 standard deviations of 8.
        assert 48 <= sum(d.domain == domain for d in valid) <= 112


def test_split_does_not_move_a_document_when_the_corpus_grows_or_is_reordered():
    small = corpus(100)
    _, valid = split_documents(small, 0.2)
    train_grown, valid_grown = split_documents([*corpus(400), Document("x", "c", "1")][::-1], 0.2)
    assert keys(valid) <= keys(valid_grown)
    assert keys(small) - keys(valid) <= keys(train_grown)


def test_documents_of_one_name_go_the_same_way_in_all_domains():
    documents = [Document("x", domain, str(i)) for domain in ("code", "comments") for i in range(300)]
    _, valid = split_documents(documents, 0.1)
    names = {domain: {d.name for d in valid if d.domain == domain} for domain in ("code", "comments")}
    assert names["code"] == names["comments"]
    assert names["code"]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_domain_of_two_documents_is_on_both_sides(fraction):
    train, valid = split_documents(corpus(2), fraction)
    assert {d.domain for d in train} == {d.domain for d in valid} == {"a", "b"}


def test_a_domains_only_document_is_trained_on():
    train, valid = split_documents([Document("x", "lone", "1"), *corpus(2, ("a",))], 0.999)
    assert ("lone", "1") in keys(train)
    assert {d.domain for d in valid} == {"a"}


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_bad_fraction(fraction):
    with pytest.raises(ValueError, match="valid_fraction: expected a number in the open interval"):
        split_documents(corpus(3), fraction)


def test_the_same_name_twice():
    with pytest.raises(ValueError, match="different names within domain 'a', got '1' twice"):
        split_documents([Document("x", "a", "1"), Document("y", "a", "1")], 0.5)


def test_cut_ends_parts_at_lines_and_loses_nothing():
    text = "".join(f"line {i}\n" for i in range(1000)) + "no end"
    parts = list(cut(text, "d", "n", size=100))
    assert "".join(str(p.text) for p in parts) == text
    assert [p.name for p in parts] == [f"n#{i}" for i in range(len(parts))]
    assert all(100 <= len(p.text) < 100 + len("line 999\n") and p.text.endswith("\n") for p in parts[:-1])
    assert list(cut("", "d", "n")) == []


def test_take_stops_with_the_document_that_reaches_the_size():
    documents = [Document("é" * 5, "a", str(i)) for i in range(10)]  # 10 bytes each
    assert [len(list(take(documents, size))) for size in (0, 1, 10, 11, 1000, None)] == [0, 1, 1, 2, 10, 10]
