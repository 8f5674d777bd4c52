"""The paper's formulas in slow, obvious numpy loops: what the package is compared with."""

import math

import numpy as np


def bin_counts(values, low, high, num_bins):
    """Histogram of one channel: equal bins from low to high, what lies beyond in the end bins.

    In float32 step by step, as the definition reads: which bin = (value - low) * (bins / extent).
    """
    counts = np.zeros(num_bins, np.int64)
    low, high = np.float32(low), np.float32(high)
    for value in np.asarray(values, np.float32):
        if high > low:
            value = min(max(value, low), high)
            b = int((value - low) * (np.float32(num_bins) / (high - low)))
        else:
            b = 0
        counts[min(max(b, 0), num_bins - 1)] += 1
    return counts


def entropy(counts):
    """Equation (1) for one channel, in nats; 0 for a channel without counts."""
    total = sum(int(count) for count in counts)
    result = 0.0
    for count in counts:
        if count > 0:
            p = int(count) / total
            result -= p * math.log(p)
    return result


def amplitudes(activations, kind):
    """Equation (2) for all channels of activations [token, channel]."""
    activations = np.asarray(activations, np.float64)
    tokens, channels = activations.shape
    result = []
    for c in range(channels):
        total = sum(float(x) ** 2 for x in activations[:, c])
        result.append(math.sqrt(total if kind == "l2" else total / tokens))
    result = np.array(result)
    if kind == "relative":
        mean = result.mean()
        result = result / mean if mean > 0 else result
    return result


def esparse_scores(weight, richness, amplitude, alpha):
    """Equation (3)."""
    out, channels = weight.shape
    scores = np.zeros((out, channels))
    for r in range(out):
        for c in range(channels):
            scores[r, c] = abs(float(weight[r, c])) * (richness[c] + alpha * amplitude[c])
    return scores


def mask_nm(scores, n, m):
    """Keeps the n largest of every m consecutive scores of a row; ties go to the lower channel."""
    scores = np.asarray(scores)
    mask = np.zeros(scores.shape, bool)
    for r, row in enumerate(scores):
        for start in range(0, len(row), m):
            left = list(range(start, start + m))
            for _ in range(n):
                best = left[0]
                for c in left[1:]:
                    if row[c] > row[best]:
                        best = c
                mask[r, best] = True
                left.remove(best)
    return mask


def retained(scores, n, m, permutation=None):
    """Equation (5): the scores that N:M keeps with the channels in this order."""
    scores = np.asarray(scores)
    if permutation is not None:
        scores = scores[:, np.asarray(permutation)]
    return sum(scores[mask_nm(scores, n, m)].tolist())


def global_deal(scores, m, snake=False):
    """Section 3.3, global naive shuffle: sort channels by mean score, deal them to the groups.

    Rank 0 goes to the first group, rank 1 to the second, and so on; each round starts at the
    first group again, or with `snake` runs back. Equal means: the lower channel comes first.
    Inside a group the order does not matter; it is ascending.
    """
    scores = np.asarray(scores)
    channels = scores.shape[1]
    groups = channels // m
    means = [sum(scores[:, c].tolist()) for c in range(channels)]
    order = sorted(range(channels), key=lambda c: -means[c])
    dealt = [[] for _ in range(groups)]
    for rank, c in enumerate(order):
        turn, group = divmod(rank, groups)
        if snake and turn % 2:
            group = groups - 1 - group
        dealt[group].append(c)
    return np.array([c for group in dealt for c in sorted(group)], np.int32)


def best_swap(scores, n, m):
    """The swap of two channels that retains most, by trying them all; None if none improves."""
    best, found = retained(scores, n, m), None
    channels = np.asarray(scores).shape[1]
    for i in range(channels):
        for j in range(i + 1, channels):
            if i // m == j // m:
                continue
            order = list(range(channels))
            order[i], order[j] = order[j], order[i]
            value = retained(scores, n, m, order)
            if value > best:
                best, found = value, (i, j)
    return found


def local_shuffle(scores, n, m, permutation, blocks):
    """Algorithm 1, lines 3 to 14: the best swap inside each block until none improves.

    `blocks` lists the positions of each block, whole groups each.
    """
    permutation = np.array(permutation)
    for positions in blocks:
        positions = np.asarray(positions)
        while True:
            swap = best_swap(np.asarray(scores)[:, permutation[positions]], n, m)
            if swap is None:
                break
            i, j = positions[swap[0]], positions[swap[1]]
            permutation[[i, j]] = permutation[[j, i]]
    return permutation
