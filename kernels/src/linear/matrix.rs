//! Weights, packed into panels.

use std::fmt;

use super::buffer::Buffer;
use super::layout::{Bits, Layout, PANEL, STEP};
use crate::format::{Block, Format};
use crate::isa::Isa;
use crate::pool::ThreadPool;

/// A weight matrix of `rows` x `cols`, packed for one instruction set.
///
/// Takes as much memory as the weights in the file, to within 3 %, but for Q3_K and Q2_K, which
/// are widened to four bits and take 1.33 and 1.95 times as much. Rows are padded to a multiple of
/// 32.
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
        let paired = isa == Isa::Avx512Bf16 && format == Format::BF16;
        let panel_bytes = match &layout {
            Some(layout) => layout.panel_bytes(cols),
            None if paired => PANEL * 4 * cols.div_ceil(2),
            None => row_bytes.checked_mul(PANEL).ok_or(PackError::TooLarge { rows, cols })?,
        };
        let panels = rows.div_ceil(PANEL);
        let total = panel_bytes.checked_mul(panels).ok_or(PackError::TooLarge { rows, cols })?;
        let packed = Buffer::new(total).ok_or(PackError::TooLarge { rows, cols })?;
        if total == 0 {
            return Ok(Matrix { isa, format, layout, rows, cols, panel_bytes, packed });
        }
        pool.run(panels, &|panel| {
            // SAFETY: each panel belongs to one task, and nothing else uses the buffer yet.
            let out = unsafe { packed.piece(panel * panel_bytes, panel_bytes) };
            let first = panel * PANEL;
            let rows = PANEL.min(rows - first);
            let bytes = &bytes[first * row_bytes..][..rows * row_bytes];
            match &layout {
                Some(layout) => pack_quantized(layout, format, row_bytes, bytes, out),
                None if format == Format::F32 => pack_floats::<4>(cols, bytes, out),
                None if paired => pack_pairs(cols, bytes, out),
                None => pack_floats::<2>(cols, bytes, out),
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
        self.packed.len()
    }

    pub(super) fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }

    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        // SAFETY: `pack` has written every panel, and lent the buffer to nobody since.
        let bytes = unsafe { self.packed.bytes() };
        &bytes[panel * self.panel_bytes..][..self.panel_bytes]
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

/// `[row][col]` to `[col][row]`, for elements of `N` bytes; a few columns at a time, so that what
/// is written stays in the first cache while the rows come by.
fn pack_floats<const N: usize>(cols: usize, bytes: &[u8], out: &mut [u8]) {
    let (elements, _) = bytes.as_chunks::<N>();
    let (out, _) = out.as_chunks_mut::<N>();
    for (first, out) in (0..cols).step_by(COLS_AT_ONCE).zip(out.chunks_mut(COLS_AT_ONCE * PANEL)) {
        for (r, row) in elements.chunks_exact(cols).enumerate() {
            for (element, out) in row[first..].iter().zip(out.as_chunks_mut::<PANEL>().0) {
                out[r] = *element;
            }
        }
    }
}

/// `[row][col]` to `[pair of cols][row]`, each pair a word with its first column in the upper half: the
/// instruction adds the product of the upper halves first.
fn pack_pairs(cols: usize, bytes: &[u8], out: &mut [u8]) {
    let (elements, _) = bytes.as_chunks::<2>();
    let (out, _) = out.as_chunks_mut::<4>();
    for (first, out) in
        (0..cols).step_by(COLS_AT_ONCE).zip(out.chunks_mut(COLS_AT_ONCE / 2 * PANEL))
    {
        for (r, row) in elements.chunks_exact(cols).enumerate() {
            for (pair, out) in row[first..].chunks(2).zip(out.as_chunks_mut::<PANEL>().0) {
                let second = pair.get(1).copied().unwrap_or_default();
                out[r] = [second[0], second[1], pair[0][0], pair[0][1]];
            }
        }
    }
}

fn pack_quantized(layout: &Layout, format: Format, row_bytes: usize, bytes: &[u8], out: &mut [u8]) {
    let mut block = Block::default();
    let group_bytes = layout.header_bytes() + layout.group() * layout.step_bytes();
    for (g, out) in out.chunks_exact_mut(group_bytes).enumerate() {
        for (r, row) in bytes.chunks_exact(row_bytes).enumerate() {
            block.open(format, &row[g * format.block_bytes()..][..format.block_bytes()]);
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
    // Four codes at a time, as the bytes of a word: no code grows out of its byte.
    let bias = EACH * u32::from(layout.bias);
    let mut words = [0; STEP / 4];
    for (word, codes) in words.iter_mut().zip(from.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*codes) + bias;
    }
    let mut put = |piece: usize, word: u32| {
        out[(piece * PANEL + r) * 4..][..4].copy_from_slice(&word.to_le_bytes());
    };
    let low = |bits: u32, g: usize| words[g] & (EACH * ((1 << bits) - 1));
    match layout.bits {
        Bits::Eight => (0..8).for_each(|g| put(g, words[g])),
        Bits::Four | Bits::Levels => (0..4).for_each(|g| put(g, words[g] | words[g + 4] << 4)),
        Bits::Five => {
            let high = |g: usize| (words[g] - low(1, g)) >> 1;
            (0..4).for_each(|g| put(g, high(g) | high(g + 4) << 4));
            put(4, (0..8).fold(0, |piece, g| piece | low(1, g) << g));
        }
        Bits::Six => {
            let high = |g: usize| (words[g] - low(2, g)) >> 2;
            (0..4).for_each(|g| put(g, high(g) | high(g + 4) << 4));
            for part in 0..2 {
                put(4 + part, (0..4).fold(0, |piece, g| piece | low(2, 4 * part + g) << (2 * g)));
            }
        }
    }
}

/// One in each byte of a word.
const EACH: u32 = 0x0101_0101;

/// Columns of floats that are packed before the next row's are.
const COLS_AT_ONCE: usize = 64;
