//! Products of a weight matrix with the inputs of a step.
//!
//! A [`Matrix`] is packed once, while loading, into panels of 32 rows whose elements lie side by
//! side, so that each lane of a vector register belongs to one output. Quantized weights are
//! multiplied as integers with inputs that are quantized to eight bits for each 32 of them
//! ([`Activations`]); bfloat16 weights meet inputs that are rounded to bfloat16, other floats the
//! inputs as they are, both with sums in f32.
//!
//! An output element is one chain of operations over the columns, from the first to the last, the
//! same in every kernel: integer dots of a block are exact, and each block is added with one fused
//! multiply-add. So the bits of an output do not depend on how many tokens are in the call, on
//! their order, on the number of threads, nor on the instruction set.

// What only the kernels of x86-64 use is idle elsewhere.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, unused_imports, unused_macros))]

mod activations;
mod buffer;
mod layout;
mod matrix;
mod scalar;
mod tiles;

pub use activations::Activations;
pub use matrix::{Matrix, PackError};

pub(crate) use activations::{QuantBlock, rounded};
pub(crate) use layout::{Bits, Layout, PANEL, STEP, Shape, with_shape};
pub(crate) use tiles::{DIRECT_TOKENS, TILE, Tile};

#[cfg(target_arch = "aarch64")]
use crate::arch::neon;
#[cfg(target_arch = "x86_64")]
use crate::arch::{avx2, avx512};
use crate::format::Format;
use crate::isa::Isa;
use crate::pool::ThreadPool;
use std::ops::Range;

/// `out[t * rows + r] = sum over c of w[r, c] * x[t, c]`, for all tokens of `x`.
///
/// Quantizes the inputs first if the weights are quantized and it has not been done yet.
///
/// # Panics
/// If the columns of `weights` and `x` differ or `out` is not tokens x rows long.
pub fn matmul(pool: &ThreadPool, weights: &Matrix, x: &mut Activations, out: &mut [f32]) {
    matmul_many(pool, &[weights], x, &mut [out]);
}

/// [`matmul`] for several matrices that read the same inputs, in one parallel region.
///
/// # Panics
/// As [`matmul`], and if there are not as many outputs as matrices or more than [`MATRICES_MAX`].
pub fn matmul_many(
    pool: &ThreadPool,
    weights: &[&Matrix],
    x: &mut Activations,
    outs: &mut [&mut [f32]],
) {
    assert_eq!(weights.len(), outs.len(), "one output for each matrix");
    assert!(weights.len() <= MATRICES_MAX, "at most {MATRICES_MAX} matrices in one call");
    for (w, out) in weights.iter().zip(outs.iter()) {
        assert_eq!(w.cols(), x.cols(), "the inputs have as many columns as the weights");
        assert_eq!(out.len(), x.tokens() * w.rows(), "the output holds tokens x rows");
    }
    for w in weights {
        match (w.isa(), w.format()) {
            (isa, _) if w.layout().is_some() => x.quantize(pool, isa),
            (Isa::Scalar, _) => {}
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Bf16, Format::BF16) => x.pair(pool),
            (_, Format::BF16) => x.round(pool),
            _ => x.interleave(pool),
        }
    }
    let x = &*x;
    let mut jobs = [None; MATRICES_MAX];
    let mut panels = 0;
    for ((w, out), job) in weights.iter().zip(outs.iter_mut()).zip(&mut jobs) {
        *job = Some(Job { weights: w, first: panels, out: out.as_mut_ptr() });
        panels += w.panels();
    }
    let run = split(pool.threads(), panels, x.tokens());
    let (tasks, chunk) = (panels.div_ceil(run), tokens_at_once(x.cols()));
    pool.run(tasks * x.tokens().div_ceil(chunk), &|task| {
        let (task, first) = (task % tasks, task / tasks * chunk);
        let tokens = first..x.tokens().min(first + chunk);
        let range = task * run..panels.min((task + 1) * run);
        for job in jobs.iter().flatten() {
            let end = job.first + job.weights.panels();
            for panel in range.start.max(job.first)..range.end.min(end) {
                job.panel(panel - job.first, x, tokens.clone());
            }
        }
    });
}

/// The most matrices that [`matmul_many`] takes.
pub const MATRICES_MAX: usize = 8;

/// Panels in a task: several tasks for each thread, so that a thread that the system took away
/// does not hold the others up, and with little work for each panel, long runs of memory.
fn split(threads: usize, panels: usize, tokens: usize) -> usize {
    if tokens >= TOKENS_PER_PANEL { 1 } else { (panels / (threads * TASKS_PER_THREAD)).max(1) }
}

/// Tokens that all panels meet before the next ones: as many as the second cache holds beside a panel,
/// where reading them anew for each panel would take the time of a product. A multiple of every tile.
fn tokens_at_once(cols: usize) -> usize {
    (BYTES_AT_ONCE / (cols * size_of::<f32>()).max(1)).max(1).next_multiple_of(4 * TILE)
}

/// One matrix of a call; `first` is its first panel among those of all matrices.
#[derive(Clone, Copy)]
struct Job<'a> {
    weights: &'a Matrix,
    first: usize,
    out: *mut f32,
}

// SAFETY: `out` points into a slice that `matmul_many` borrows mutably until all tasks have ended,
// and no two tasks take the same panel and tokens, so no two threads touch the same element.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// Computes the rows of one panel for some of the tokens.
    fn panel(&self, panel: usize, x: &Activations, tokens: Range<usize>) {
        let w = self.weights;
        let rows = PANEL.min(w.rows() - panel * PANEL);
        // SAFETY: the panel begins at row `panel * PANEL`, which is below the number of rows, so
        // the pointer stays inside of the first token's row of the output.
        let first = unsafe { self.out.add(panel * PANEL) };
        let out = PanelOut { first, stride: w.rows(), rows, tokens };
        let bytes = w.panel(panel);
        match (w.isa(), w.layout()) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx512Bf16, Some(_)) => {
                // SAFETY: `Matrix::pack` made sure that the CPU has the matrix's instruction set.
                with_shape!(w.format(), S => unsafe { avx512::quantized::<S>(bytes, x, &out) })
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Bf16, None) if w.format() == Format::BF16 => {
                // SAFETY: as above.
                unsafe { avx512::pairs(bytes, x, &out) }
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx512Bf16, None) => {
                // SAFETY: as above.
                unsafe { avx512::floats(w.format(), bytes, x, &out) }
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, Some(_)) => {
                // SAFETY: as above.
                with_shape!(w.format(), S => unsafe { avx2::quantized::<S>(bytes, x, &out) })
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, None) => {
                // SAFETY: as above.
                unsafe { avx2::floats(w.format(), bytes, x, &out) }
            }
            #[cfg(target_arch = "aarch64")]
            (isa @ (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm), Some(_)) => {
                // SAFETY: as above.
                with_shape!(w.format(), S => unsafe { neon::quantized::<S>(isa, bytes, x, &out) })
            }
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, None) => {
                // SAFETY: as above.
                unsafe { neon::floats(w.format(), bytes, x, &out) }
            }
            (_, Some(layout)) => scalar::quantized(layout, bytes, x, &out),
            (_, None) => scalar::floats(w.format(), bytes, x, &out),
        }
    }
}

/// Which tokens meet a panel, and where its results go: `rows` elements for each token, `stride` apart.
pub(crate) struct PanelOut {
    first: *mut f32,
    stride: usize,
    rows: usize,
    /// Some of the call's.
    pub tokens: Range<usize>,
}

impl PanelOut {
    /// Stores the rows of one token.
    ///
    /// # Safety
    /// `token` is below the number of tokens of the call.
    pub unsafe fn store(&self, token: usize, values: &[f32; PANEL]) {
        // SAFETY: `matmul_many` checked that the output holds tokens x stride elements, and the
        // panel's rows end at or before the stride.
        unsafe {
            let to = self.first.add(token * self.stride);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, self.rows);
        }
    }
}

const TASKS_PER_THREAD: usize = 8;

/// Bytes of inputs in f32. In eight bits they take half of it, which leaves room for a panel in a second
/// cache of 1 MiB.
const BYTES_AT_ONCE: usize = 1 << 20;

/// From so many tokens on, a panel is work enough for a task.
const TOKENS_PER_PANEL: usize = 16;
