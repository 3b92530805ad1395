"""The layer without a framework: what was asked for, where, which numbers, which passes.

Nothing here imports a framework or anything outside this folder. Arithmetic is written over an explicit array
namespace, so that one text serves NumPy, TensorFlow and any array that follows the array API standard.
"""
