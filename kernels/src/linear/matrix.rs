//! Weights, packed into panels.

use std::alloc::{Layout as Memory, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ptr::NonNull;

use super::layout::{Bits, Layout, PANEL, STEP};
use crate::format::{Block, Format};
use crate::isa::Isa;
use crate::pool::ThreadPool;

/// A weight matrix of `rows` x `cols`, packed for one instruction set.
///
/// Costs about as much memory as the file: the same for floats, Q4_0, Q4_1, Q8_0, Q6_K and the
/// IQ4 formats, up to 3 % more for Q4_K and 20 to 30 % for Q5; Q3_K and Q2_K are widened to four
/// bits. Rows are padded to a multiple of 32.
pub struct Matrix {
    isa: Isa,
    format: Format,
    layout: Option<Layout>,
    rows: usize,
    cols: usize,
    panel_bytes: usize,
    packed: Buffer,
}

impl Matrix {
    /// Packs row-major `bytes`, whose rows follow each other without gaps.
    pub fn pack(
        isa: Isa,
        pool: &ThreadPool,
        format: Format,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Matrix, PackError> {
        let row_bytes = format.bytes_for(cols).ok_or(PackError::Columns { format, cols })?;
        let need = row_bytes.checked_mul(rows).ok_or(PackError::TooLarge { rows, cols })?;
        if need != bytes.len() {
            return Err(PackError::Length { format, rows, cols, need, bytes: bytes.len() });
        }
        if !isa.is_available() {
            return Err(PackError::Isa { isa });
        }
        let layout = Layout::of(format);
        let panel_bytes = match &layout {
            Some(layout) => layout.panel_bytes(cols),
            None => row_bytes.checked_mul(PANEL).ok_or(PackError::TooLarge { rows, cols })?,
        };
        let panels = rows.div_ceil(PANEL);
        let total = panel_bytes.checked_mul(panels).ok_or(PackError::TooLarge { rows, cols })?;
        let packed = Buffer::zeroed(total).ok_or(PackError::TooLarge { rows, cols })?;
        let start = Start(packed.start.as_ptr());
        pool.run(panels, &|panel| {
            // SAFETY: each task has a panel of its own, inside of the buffer's `total` bytes.
            let out = unsafe {
                std::slice::from_raw_parts_mut(start.at(panel * panel_bytes), panel_bytes)
            };
            let first = panel * PANEL;
            let rows = PANEL.min(rows - first);
            let bytes = &bytes[first * row_bytes..][..rows * row_bytes];
            match &layout {
                Some(layout) => pack_quantized(layout, format, row_bytes, bytes, out),
                None => pack_floats(format.block_bytes(), row_bytes, bytes, out),
            }
        });
        Ok(Matrix { isa, format, layout, rows, cols, panel_bytes, packed })
    }

    /// Rows: outputs for each token.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: inputs for each token.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The format that the weights came in.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The instruction set whose kernels multiply this matrix.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Bytes of memory that the packed weights take.
    pub fn packed_bytes(&self) -> usize {
        self.packed.len
    }

    pub(super) fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }

    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        &self.packed.bytes()[panel * self.panel_bytes..][..self.panel_bytes]
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix({} {}x{} {})", self.format, self.rows, self.cols, self.isa)
    }
}

/// Why weights cannot be packed. Nothing was kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PackError {
    /// A row does not end with a block.
    Columns { format: Format, cols: usize },
    /// The bytes are not as many as the shape takes.
    Length { format: Format, rows: usize, cols: usize, need: usize, bytes: usize },
    /// The shape does not fit into memory.
    TooLarge { rows: usize, cols: usize },
    /// The CPU lacks the instruction set.
    Isa { isa: Isa },
}

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PackError::Columns { format, cols } => write!(
                f,
                "a row of {cols} values does not fill {format} blocks of {} values",
                format.block_len()
            ),
            PackError::Length { format, rows, cols, need, bytes } => {
                write!(f, "{rows} x {cols} {format} values take {need} bytes, not {bytes}")
            }
            PackError::TooLarge { rows, cols } => {
                write!(f, "a matrix of {rows} x {cols} values does not fit into memory")
            }
            PackError::Isa { isa } => write!(f, "this CPU does not have {isa}"),
        }
    }
}

impl std::error::Error for PackError {}

/// `[row][col]` to `[col][row]`, for elements of `size` bytes.
fn pack_floats(size: usize, row_bytes: usize, bytes: &[u8], out: &mut [u8]) {
    for (r, row) in bytes.chunks_exact(row_bytes.max(1)).enumerate() {
        for (element, out) in row.chunks_exact(size).zip(out.chunks_exact_mut(PANEL * size)) {
            out[r * size..][..size].copy_from_slice(element);
        }
    }
}

fn pack_quantized(layout: &Layout, format: Format, row_bytes: usize, bytes: &[u8], out: &mut [u8]) {
    let mut block = Block::default();
    let group_bytes = layout.header_bytes() + layout.group() * layout.step_bytes();
    for (r, row) in bytes.chunks_exact(row_bytes.max(1)).enumerate() {
        let groups = out.chunks_exact_mut(group_bytes);
        for (bytes, out) in row.chunks_exact(format.block_bytes()).zip(groups) {
            block.open(format, bytes);
            pack_group(layout, &block, r, out);
        }
    }
}

/// Puts the opened block of row `r` into its lane.
fn pack_group(layout: &Layout, block: &Block, r: usize, out: &mut [u8]) {
    let (header, steps) = out.split_at_mut(layout.header_bytes());
    put_halves(layout, block, r, header);
    for (s, step) in steps.chunks_exact_mut(layout.step_bytes()).enumerate() {
        let (scales, codes) = step.split_at_mut(layout.scale_bytes());
        if layout.nested {
            let subs = STEP / layout.sub_len;
            for sub in 0..subs {
                scales[sub * PANEL + r] = block.scales[s * subs + sub] as u8;
                if layout.mins {
                    scales[(subs + sub) * PANEL + r] = block.mins[s * subs + sub];
                }
            }
        } else {
            put_halves(layout, block, r, scales);
        }
        let from: &[u8; STEP] = block.codes[s * STEP..].first_chunk().expect("a step of codes");
        put_codes(layout, from, r, codes);
    }
}

/// The binary16 scale and minimum of a row, wherever the layout has them.
fn put_halves(layout: &Layout, block: &Block, r: usize, out: &mut [u8]) {
    if out.is_empty() {
        return;
    }
    out[2 * r..][..2].copy_from_slice(&block.d.to_le_bytes());
    if layout.mins {
        out[2 * (PANEL + r)..][..2].copy_from_slice(&block.dmin.to_le_bytes());
    }
}

fn put_codes(layout: &Layout, from: &[u8; STEP], r: usize, out: &mut [u8]) {
    for (i, &code) in from.iter().enumerate() {
        let code = code + layout.bias;
        let g = i / 4;
        let mut put = |v: usize, bits: u8| out[(v * PANEL + r) * 4 + i % 4] |= bits;
        match layout.bits {
            Bits::Eight => put(g, code),
            Bits::Four | Bits::Levels => put(g % 4, code << (g / 4 * 4)),
            Bits::Six => {
                put(g % 4, (code >> 2) << (g / 4 * 4));
                put(4 + g / 4, (code & 3) << (g % 4 * 2));
            }
        }
    }
}

/// Zeroed memory that begins at a cache line.
struct Buffer {
    start: NonNull<u8>,
    len: usize,
}

/// The start of a buffer that tasks write disjoint parts of.
struct Start(*mut u8);

// SAFETY: the pointer is only used to make slices that do not overlap (see `Matrix::pack`).
unsafe impl Sync for Start {}

impl Start {
    /// # Safety
    /// `offset` lies inside of the buffer or at its end.
    unsafe fn at(&self, offset: usize) -> *mut u8 {
        // SAFETY: promised by the caller.
        unsafe { self.0.add(offset) }
    }
}

// SAFETY: a `Buffer` owns its memory and hands out shared slices only.
unsafe impl Send for Buffer {}
// SAFETY: as above, and nothing is mutable behind a shared reference.
unsafe impl Sync for Buffer {}

impl Buffer {
    fn zeroed(len: usize) -> Option<Buffer> {
        let memory = Memory::from_size_align(len.max(1), LINE).ok()?;
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(memory) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(memory));
        Some(Buffer { start, len })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `start` owns `len` initialized bytes for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = Memory::from_size_align(self.len.max(1), LINE).expect("checked in zeroed");
        // SAFETY: allocated in `zeroed` with this very layout.
        unsafe { dealloc(self.start.as_ptr(), memory) }
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;
