"""`Layout`: where the sample of each layer lies, and how buckets are split."""

import pytest
import torch

from altgrad.twins.layout import CHUNK, Bucket, Layout

TWO = Layout((Bucket(0, {"a": 256, "b": 10}), Bucket(1, {"c": 3}, torch.Size([3]))))


def test_flat_buckets_are_padded_to_full_chunks() -> None:
    assert [bucket.length for bucket in TWO.buckets] == [320, 3]
    assert TWO.slices == (slice(0, 320), slice(320, 323))
    assert TWO.length == 384


@pytest.mark.parametrize(("count", "length"), [(256, 4096), (4096, 4096), (4352, 4352)])
def test_a_bucket_has_the_least_length_also_when_it_is_split(count: int, length: int) -> None:
    bucket = Bucket(0, {"a": count, "b": 256}, least=4096)
    assert bucket.split(["a"], 1) == Bucket(1, {"a": count}, least=4096)
    assert bucket.split(["a"], 1).length == length
    layout = Layout((bucket, Bucket(0, {"c": 3}, torch.Size([3]), least=4096)))
    assert layout.slices[1] == slice(bucket.length, bucket.length + 3)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 256])
def test_each_bucket_begins_at_a_full_chunk(count: int) -> None:
    layout = Layout(
        (Bucket(0, {"a": count}), Bucket(0, {"b": 7}, torch.Size([7])), Bucket(0, {"c": 1}))
    )
    assert all(each.start % CHUNK == 0 for each in layout.slices)
    assert layout.length % CHUNK == 0


def test_layers_follow_each_other_in_their_bucket() -> None:
    assert TWO.places == {"a": slice(0, 256), "b": slice(256, 266), "c": slice(320, 323)}
    assert TWO.bucket_numbers == {"a": 0, "b": 0, "c": 1}


def test_a_split_bucket_keeps_counts_and_shape() -> None:
    assert TWO.buckets[0].split(["b"], 3) == Bucket(3, {"b": 10})
    assert TWO.buckets[1].split(["c"], 1).shape == torch.Size([3])


def test_sources_say_where_elements_lay_before() -> None:
    later = Layout((Bucket(0, {"b": 10, "d": 2}),))
    sources = TWO.find_sources(later)
    assert sources[:10].tolist() == [*range(256, 266)]
    assert set(sources[10:].tolist()) == {-1}


def test_a_layer_with_another_sample_is_new() -> None:
    later = Layout((Bucket(0, {"a": 128, "b": 10}),))
    sources = TWO.find_sources(later, {"a"})
    assert {*sources[:128].tolist()} == {-1}
    assert min(sources[128:138].tolist()) > 0


def test_rows_have_one_width_and_a_mask() -> None:
    columns = [torch.arange(count) for count in (3, 256, 10)]
    rows, mask = TWO.find_rows(["c", "a", "b"], columns)
    assert rows.shape == mask.shape == (3, 256)
    assert rows[0, :3].tolist() == [320, 321, 322]
    assert mask.sum(1).tolist() == [3, 256, 10]
    assert rows[~mask].unique().tolist() == [0]


def test_elements_stand_in_their_columns() -> None:
    rows, mask = TWO.find_rows(["c", "b"], [torch.tensor([0, 1, 4]), torch.arange(10)])
    assert rows[0].tolist() == [320, 321, 0, 0, 322, 0, 0, 0, 0, 0]
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 4]
    assert mask[1].all()


def test_an_empty_layout_has_no_element() -> None:
    assert Layout().length == 0
    assert Layout().find_rows([], [])[0].shape == (0, 0)
