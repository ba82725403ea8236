"""ScaleKD's loss terms in numpy, with gradients.

They show the effect of a codec's error on a student.

Unweighted, in float64. The trainer's own are in torch and do not belong to the store; tests compare the two.

Shape legend: B batch, N tokens, D channels, K classes.
"""

import numpy as np

Term = tuple[float, np.ndarray]
"""A loss and its gradient with respect to the student's side."""


def original_view(student_BND: np.ndarray, teacher_BND: np.ndarray) -> Term:
    """L_ori = sum_n ||p_n / |p_n| - t_n / |t_n|||^2 / B, and dL_ori / dp."""
    p, t = (x.astype(np.float64) for x in (student_BND, teacher_BND))
    length = np.linalg.norm(p, axis=-1, keepdims=True)
    p, t = p / length, t / np.linalg.norm(t, axis=-1, keepdims=True)
    cosine = (p * t).sum(axis=-1, keepdims=True)
    return float(np.square(p - t).sum() / len(p)), -2 / len(p) * (t - cosine * p) / length


def alternative_view(student_BND: np.ndarray, teacher_BND: np.ndarray) -> Term:
    """L_alt: L_ori of both less their means over tokens, and dL_alt / dp."""
    loss, gradient = original_view(without_mean(student_BND), without_mean(teacher_BND))
    return loss, without_mean(gradient)


def distillation(student_BK: np.ndarray, teacher_BK: np.ndarray) -> Term:
    """L_kd = -sum_k softmax(z)_k log softmax(s)_k / B at temperature 1, and dL_kd / ds."""
    probabilities, student = softmax(teacher_BK), _log_softmax(student_BK)
    return float(-(probabilities * student).sum() / len(student)), (np.exp(student) - probabilities) / len(student)


def without_mean(x_BND: np.ndarray) -> np.ndarray:
    """Less each sample's mean over tokens, per channel: phi of the paper."""
    return x_BND - x_BND.mean(axis=1, keepdims=True, dtype=np.float64)


def softmax(logits_BK: np.ndarray) -> np.ndarray:
    """Probabilities of logits, in float64."""
    return np.exp(_log_softmax(logits_BK))


FEATURE_TERMS = {"original": original_view, "alternative": alternative_view}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
