//! The small operations between matrix products: norms, activations, residuals, positions.
//!
//! Each acts on rows that do not see each other, gives the same bits on every instruction set and
//! with any number of threads, and allocates nothing. Matrices are row-major slices of f32 whose row
//! length is that of the weight or bias. Slices whose lengths do not fit are a mistake of the caller
//! and panic.

mod rope;

pub use rope::{RopeLayout, RopeTable};

use crate::isa::Isa;
use crate::pool::ThreadPool;
use crate::simd::{LANES, Lanes, dispatch};

/// `out[t] = weight * x[t] / sqrt(mean(x[t]^2) + eps)` for each row, `weight.len()` wide (Zhang and
/// Sennrich 2019, "Root mean square layer normalization").
///
/// With rows of one head it is the q/k norm of Qwen3.
pub fn rms_norm(pool: &ThreadPool, isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_rows(x.len(), weight.len());
    assert_eq!(x.len(), out.len(), "input and output differ in length");
    let chunk_len = chunk_len(weight.len());
    pool.run_chunks(out, chunk_len, |index, out| {
        let x = &x[index * chunk_len..][..out.len()];
        // SAFETY: whole rows of both, as checked above; asks for nothing but the CPU otherwise.
        unsafe {
            dispatch!(isa, rms_norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]))
        }
    });
}

/// [`rms_norm`] in place: the q/k norm with `x` of [tokens, heads, head_dim] and `weight` of
/// `[head_dim]`.
pub fn rms_norm_in_place(pool: &ThreadPool, isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    assert_rows(x.len(), weight.len());
    pool.run_chunks(x, chunk_len(weight.len()), |_, x| {
        // SAFETY: whole rows, as checked above; asks for nothing but the CPU otherwise.
        unsafe { dispatch!(isa, rms_norm_rows_in_place(x: &mut [f32], weight: &[f32], eps: f32)) }
    });
}

/// `x += delta`, then `out = rms_norm(x)`: a residual and the norm that follows it, in one pass.
pub fn add_rms_norm(
    pool: &ThreadPool,
    isa: Isa,
    x: &mut [f32],
    delta: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    assert_rows(x.len(), weight.len());
    assert_eq!(x.len(), delta.len(), "residual and addend differ in length");
    assert_eq!(x.len(), out.len(), "input and output differ in length");
    let chunk_len = chunk_len(weight.len());
    pool.run_chunks2(x, chunk_len, out, chunk_len, |index, x, out| {
        let delta = &delta[index * chunk_len..][..x.len()];
        // SAFETY: equal lengths and whole rows, as checked above.
        unsafe {
            dispatch!(isa, add_rows(x: &mut [f32], delta: &[f32]));
            let x = &*x;
            dispatch!(isa, rms_norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]));
        }
    });
}

/// `x += delta`.
pub fn add(pool: &ThreadPool, isa: Isa, x: &mut [f32], delta: &[f32]) {
    assert_eq!(x.len(), delta.len(), "sum and addend differ in length");
    pool.run_chunks(x, ELEMENTS_PER_TASK, |index, x| {
        let delta = &delta[index * ELEMENTS_PER_TASK..][..x.len()];
        // SAFETY: equal lengths.
        unsafe { dispatch!(isa, add_rows(x: &mut [f32], delta: &[f32])) }
    });
}

/// `x[t] += bias` for each row.
pub fn add_bias(pool: &ThreadPool, isa: Isa, x: &mut [f32], bias: &[f32]) {
    assert_rows(x.len(), bias.len());
    pool.run_chunks(x, chunk_len(bias.len()), |_, x| {
        for row in x.chunks_exact_mut(bias.len()) {
            // SAFETY: equal lengths.
            unsafe { dispatch!(isa, add_rows(row: &mut [f32], bias: &[f32])) }
        }
    });
}

/// `gate = silu(gate) * up` with silu(x) = x / (1 + e^-x) (Shazeer 2020, "GLU variants improve
/// transformer").
pub fn silu_mul(pool: &ThreadPool, isa: Isa, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "gate and up differ in length");
    pool.run_chunks(gate, ELEMENTS_PER_TASK, |index, gate| {
        let up = &up[index * ELEMENTS_PER_TASK..][..gate.len()];
        // SAFETY: equal lengths.
        unsafe { dispatch!(isa, silu_mul_rows(gate: &mut [f32], up: &[f32])) }
    });
}

/// `x = e^(x - max) / sum(e^(x - max))`. Entries of -infinity become exactly zero; an `x` that is
/// empty or has no finite maximum has no softmax, and becomes NaN.
pub fn softmax(isa: Isa, x: &mut [f32]) {
    // SAFETY: asks for nothing but the CPU.
    unsafe { dispatch!(isa, softmax_row(x: &mut [f32])) }
}

/// The index of the greatest element, the first of equals; None if `x` is empty. NaN is never chosen
/// unless there is nothing else.
pub fn argmax(isa: Isa, x: &[f32]) -> Option<usize> {
    // SAFETY: asks for nothing but the CPU.
    let greatest = unsafe { dispatch!(isa, greatest(x: &[f32]) -> f32) };
    x.iter().position(|&v| v == greatest).or(if x.is_empty() { None } else { Some(0) })
}

#[inline(always)]
unsafe fn rms_norm_rows<L: Lanes>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let dim = weight.len();
    for (x, out) in x.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
        // SAFETY: rows of `dim` elements.
        unsafe { rms_norm_row::<L>(x.as_ptr(), weight, eps, out.as_mut_ptr()) };
    }
}

#[inline(always)]
unsafe fn rms_norm_rows_in_place<L: Lanes>(x: &mut [f32], weight: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len()) {
        let row = row.as_mut_ptr();
        // SAFETY: a row of `dim` elements, read before it is written at each place.
        unsafe { rms_norm_row::<L>(row, weight, eps, row) };
    }
}

/// `x` and `out` have `weight.len()` elements and are the same row or do not overlap.
#[inline(always)]
unsafe fn rms_norm_row<L: Lanes>(x: *const f32, weight: &[f32], eps: f32, out: *mut f32) {
    let dim = weight.len();
    let whole = dim / LANES * LANES;
    let rest = dim - whole;
    // SAFETY: every offset is below `dim`, and `load_part` and `store_part` stay below it too.
    unsafe {
        let mut squares = L::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            let v = L::load(x.add(i));
            squares = v.fma(v, squares);
        }
        if rest > 0 {
            let v = L::load_part(x.add(whole), rest, 0.0);
            squares = v.fma(v, squares);
        }
        let scale = L::splat(1.0 / (squares.sum() / dim as f32 + eps).sqrt());
        for i in (0..whole).step_by(LANES) {
            let v = L::load(x.add(i)).mul(scale);
            v.mul(L::load(weight.as_ptr().add(i))).store(out.add(i));
        }
        if rest > 0 {
            let v = L::load_part(x.add(whole), rest, 0.0).mul(scale);
            let w = L::load_part(weight.as_ptr().add(whole), rest, 0.0);
            v.mul(w).store_part(out.add(whole), rest);
        }
    }
}

#[inline(always)]
unsafe fn add_rows<L: Lanes>(x: &mut [f32], delta: &[f32]) {
    let whole = x.len() / LANES * LANES;
    // SAFETY: both slices have the same length (the caller's promise), and `i` stays below it.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            let sum = L::load(x.as_ptr().add(i)).add(L::load(delta.as_ptr().add(i)));
            sum.store(x.as_mut_ptr().add(i));
        }
    }
    for (x, delta) in x[whole..].iter_mut().zip(&delta[whole..]) {
        *x += delta;
    }
}

#[inline(always)]
unsafe fn silu_mul_rows<L: Lanes>(gate: &mut [f32], up: &[f32]) {
    let whole = gate.len() / LANES * LANES;
    let rest = gate.len() - whole;
    // SAFETY: both slices have the same length (the caller's promise), and offsets stay below it.
    unsafe {
        let (gate, up) = (gate.as_mut_ptr(), up.as_ptr());
        for i in (0..whole).step_by(LANES) {
            silu::<L>(L::load(gate.add(i))).mul(L::load(up.add(i))).store(gate.add(i));
        }
        if rest > 0 {
            let g = silu::<L>(L::load_part(gate.add(whole), rest, 0.0));
            g.mul(L::load_part(up.add(whole), rest, 0.0)).store_part(gate.add(whole), rest);
        }
    }
}

#[inline(always)]
unsafe fn silu<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's promise about the CPU.
    unsafe { x.div(L::splat(1.0).add(L::splat(0.0).sub(x).exp())) }
}

#[inline(always)]
unsafe fn softmax_row<L: Lanes>(x: &mut [f32]) {
    let whole = x.len() / LANES * LANES;
    let rest = x.len() - whole;
    // SAFETY: offsets stay below the length of `x`.
    unsafe {
        let max = L::splat(greatest::<L>(x));
        let x = x.as_mut_ptr();
        let mut total = L::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            let e = L::load(x.add(i)).sub(max).exp();
            total = total.add(e);
            e.store(x.add(i));
        }
        if rest > 0 {
            let e = L::load_part(x.add(whole), rest, f32::NEG_INFINITY).sub(max).exp();
            total = total.add(e);
            e.store_part(x.add(whole), rest);
        }
        let total = L::splat(total.sum());
        for i in (0..whole).step_by(LANES) {
            L::load(x.add(i)).div(total).store(x.add(i));
        }
        if rest > 0 {
            L::load_part(x.add(whole), rest, 0.0).div(total).store_part(x.add(whole), rest);
        }
    }
}

/// The greatest element that is not NaN, -infinity if there is none.
#[inline(always)]
unsafe fn greatest<L: Lanes>(x: &[f32]) -> f32 {
    let whole = x.len() / LANES * LANES;
    // SAFETY: offsets stay below the length of `x`.
    unsafe {
        let mut max = L::splat(f32::NEG_INFINITY);
        for i in (0..whole).step_by(LANES) {
            // `max` yields its second operand for NaN.
            max = L::load(x.as_ptr().add(i)).max(max);
        }
        if whole < x.len() {
            let part = L::load_part(x.as_ptr().add(whole), x.len() - whole, f32::NEG_INFINITY);
            max = part.max(max);
        }
        max.greatest()
    }
}

fn assert_rows(len: usize, dim: usize) {
    assert!(dim > 0 && len.is_multiple_of(dim), "{len} elements are not rows of {dim}");
}

/// Whole rows of `dim` elements, about [`ELEMENTS_PER_TASK`].
fn chunk_len(dim: usize) -> usize {
    dim * (ELEMENTS_PER_TASK / dim).max(1)
}

/// Elements that one task takes: about the time that it takes to start a region. Smaller tasks cost
/// more than they win, larger ones leave threads idle at the end. A multiple of the lanes.
const ELEMENTS_PER_TASK: usize = 8192;

#[cfg(test)]
mod tests;
