//! The number formats of GGUF tensors: their ids, their sizes and their exact values.
//!
//! The layouts are those of ggml (`ggml-common.h`), and [`dequantize`] gives the very bits that
//! the `gguf` Python package gives. Every quantized block, of whatever format, is opened into one
//! common shape first, so that a layout is written down once and both dequantization and the
//! packing of matrices read it there.

use std::fmt;

use crate::float;

/// A tensor's number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
}

impl Format {
    /// Every format, in the order of the declaration.
    pub const ALL: [Format; 15] = [
        Format::F32,
        Format::F16,
        Format::BF16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2_K,
        Format::Q3_K,
        Format::Q4_K,
        Format::Q5_K,
        Format::Q6_K,
        Format::IQ4_NL,
        Format::IQ4_XS,
    ];

    /// The format with this ggml type id, if it is one of ours.
    pub fn from_ggml(id: u32) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.ggml() == id)
    }

    /// The ggml type id.
    pub fn ggml(self) -> u32 {
        self.row().0
    }

    /// The name that ggml gives it.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Elements in a block: the smallest piece that can be stored.
    pub const fn block_len(self) -> usize {
        self.row().2
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.row().3
    }

    /// Whether elements share scales, so that a block has more than one element.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Bytes of `elements` elements; none if they do not fill whole blocks or do not fit `usize`.
    pub fn bytes_for(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_len()) {
            return None;
        }
        (elements / self.block_len()).checked_mul(self.block_bytes())
    }

    const fn row(self) -> (u32, &'static str, usize, usize) {
        match self {
            Format::F32 => (0, "F32", 1, 4),
            Format::F16 => (1, "F16", 1, 2),
            Format::BF16 => (30, "BF16", 1, 2),
            Format::Q4_0 => (2, "Q4_0", 32, 18),
            Format::Q4_1 => (3, "Q4_1", 32, 20),
            Format::Q5_0 => (6, "Q5_0", 32, 22),
            Format::Q5_1 => (7, "Q5_1", 32, 24),
            Format::Q8_0 => (8, "Q8_0", 32, 34),
            Format::Q2_K => (10, "Q2_K", 256, 84),
            Format::Q3_K => (11, "Q3_K", 256, 110),
            Format::Q4_K => (12, "Q4_K", 256, 144),
            Format::Q5_K => (13, "Q5_K", 256, 176),
            Format::Q6_K => (14, "Q6_K", 256, 210),
            Format::IQ4_NL => (20, "IQ4_NL", 32, 18),
            Format::IQ4_XS => (23, "IQ4_XS", 256, 136),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why bytes and values do not fit together. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LengthError {
    pub format: Format,
    pub bytes: usize,
    pub elements: usize,
}

impl fmt::Display for LengthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LengthError { format, bytes, elements } = self;
        match format.bytes_for(*elements) {
            Some(need) => write!(f, "{elements} {format} values take {need} bytes, not {bytes}"),
            None => write!(
                f,
                "{elements} values do not fill {format} blocks of {} values",
                format.block_len()
            ),
        }
    }
}

impl std::error::Error for LengthError {}

pub(crate) fn check_lengths(
    format: Format,
    bytes: usize,
    elements: usize,
) -> Result<(), LengthError> {
    match format.bytes_for(elements) {
        Some(need) if need == bytes => Ok(()),
        _ => Err(LengthError { format, bytes, elements }),
    }
}

/// The f32 values of `bytes`, which holds exactly `out.len()` elements of `format`.
pub fn dequantize(format: Format, bytes: &[u8], out: &mut [f32]) -> Result<(), LengthError> {
    check_lengths(format, bytes.len(), out.len())?;
    match format {
        Format::F32 => {
            for (b, o) in bytes.as_chunks::<4>().0.iter().zip(out) {
                *o = f32::from_le_bytes(*b);
            }
        }
        Format::F16 => widen(bytes, out, float::f16_to_f32),
        Format::BF16 => widen(bytes, out, float::bf16_to_f32),
        _ => {
            let mut block = Block::default();
            let pieces = bytes.chunks_exact(format.block_bytes());
            for (bytes, out) in pieces.zip(out.chunks_exact_mut(format.block_len())) {
                block.open(format, bytes);
                block.values(format, out);
            }
        }
    }
    Ok(())
}

fn widen(bytes: &[u8], out: &mut [f32], convert: impl Fn(u16) -> f32) {
    for (b, o) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *o = convert(u16::from_le_bytes(*b));
    }
}

/// A quantized block, opened. Element `i` of sub-block `s = i / sub_len` is
/// `d * scales[s] * level(codes[i]) - dmin * mins[s]`, each product rounded to f32.
///
/// `level` subtracts [`zero_point`] or, for the IQ4 formats, looks up [`IQ4_LEVELS`]. Formats
/// without scales of their own have a scale of one; `x + m` is written as `x - (-m)`, which is
/// the same number.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub codes: [u8; MAX_BLOCK_LEN],
    /// binary16 bits.
    pub d: u16,
    /// binary16 bits, sign as in the formula above.
    pub dmin: u16,
    pub scales: [i8; MAX_BLOCK_LEN / 16],
    pub mins: [u8; MAX_BLOCK_LEN / 16],
}

impl Default for Block {
    fn default() -> Block {
        Block { codes: [0; 256], d: 0, dmin: 0, scales: [1; 16], mins: [0; 16] }
    }
}

impl Block {
    /// Reads one block. `bytes` has the length of a block of `format`, which is quantized.
    pub fn open(&mut self, format: Format, bytes: &[u8]) {
        debug_assert_eq!(bytes.len(), format.block_bytes());
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        match format {
            Format::F32 | Format::F16 | Format::BF16 => unreachable!("floats have no blocks"),
            Format::Q4_0 | Format::IQ4_NL => {
                self.d = half(0);
                split_nibbles(&bytes[2..18], &mut self.codes);
            }
            Format::Q4_1 => {
                (self.d, self.dmin) = (half(0), half(2) ^ SIGN);
                self.mins[0] = 1;
                split_nibbles(&bytes[4..20], &mut self.codes);
            }
            Format::Q5_0 => {
                self.d = half(0);
                split_nibbles(&bytes[6..22], &mut self.codes);
                self.add_fifth_bits(&bytes[2..6]);
            }
            Format::Q5_1 => {
                (self.d, self.dmin) = (half(0), half(2) ^ SIGN);
                self.mins[0] = 1;
                split_nibbles(&bytes[8..24], &mut self.codes);
                self.add_fifth_bits(&bytes[4..8]);
            }
            Format::Q8_0 => {
                self.d = half(0);
                for (code, byte) in self.codes.iter_mut().zip(&bytes[2..34]) {
                    *code = byte ^ 0x80;
                }
            }
            Format::Q2_K => self.open_q2_k(bytes),
            Format::Q3_K => self.open_q3_k(bytes),
            Format::Q4_K => {
                (self.d, self.dmin) = (half(0), half(2));
                self.open_scales_and_mins(&bytes[4..16]);
                self.open_pairs(&bytes[16..144]);
            }
            Format::Q5_K => {
                (self.d, self.dmin) = (half(0), half(2));
                self.open_scales_and_mins(&bytes[4..16]);
                self.open_pairs(&bytes[48..176]);
                for (bit, codes) in self.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    for (code, byte) in codes.iter_mut().zip(&bytes[16..48]) {
                        *code |= ((byte >> bit) & 1) << 4;
                    }
                }
            }
            Format::Q6_K => self.open_q6_k(bytes),
            Format::IQ4_XS => self.open_iq4_xs(bytes),
        }
    }

    /// The values of an opened block.
    pub fn values(&self, format: Format, out: &mut [f32]) {
        let (d, dmin) = (float::f16_to_f32(self.d), float::f16_to_f32(self.dmin));
        let sub_len = sub_len(format);
        for (s, out) in out.chunks_exact_mut(sub_len).enumerate() {
            let scale = d * f32::from(self.scales[s]);
            let min = dmin * f32::from(self.mins[s]);
            for (o, &code) in out.iter_mut().zip(&self.codes[s * sub_len..]) {
                let value = scale * level(format, code) as f32;
                *o = if has_mins(format) { value - min } else { value };
            }
        }
    }

    fn add_fifth_bits(&mut self, bytes: &[u8]) {
        for (i, code) in self.codes[..32].iter_mut().enumerate() {
            *code |= ((bytes[i / 8] >> (i % 8)) & 1) << 4;
        }
    }

    fn open_q2_k(&mut self, bytes: &[u8]) {
        for s in 0..16 {
            self.scales[s] = (bytes[s] & 15) as i8;
            self.mins[s] = bytes[s] >> 4;
        }
        self.open_quarters(&bytes[16..80]);
        self.d = u16::from_le_bytes([bytes[80], bytes[81]]);
        self.dmin = u16::from_le_bytes([bytes[82], bytes[83]]);
    }

    fn open_q3_k(&mut self, bytes: &[u8]) {
        self.open_quarters(&bytes[32..96]);
        for (bit, codes) in self.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (code, byte) in codes.iter_mut().zip(&bytes[..32]) {
                *code |= ((byte >> bit) & 1) << 2;
            }
        }
        let (low, high) = (&bytes[96..104], &bytes[104..108]);
        for s in 0..16 {
            let low = (low[s % 8] >> (4 * (s / 8))) & 15;
            let high = (high[s % 4] >> (2 * (s / 4))) & 3;
            self.scales[s] = (low | high << 4) as i8 - 32;
        }
        self.d = u16::from_le_bytes([bytes[108], bytes[109]]);
    }

    fn open_q6_k(&mut self, bytes: &[u8]) {
        // The high bits lie as those of Q2_K do; a half's low ones are 64 low nibbles, then 64
        // high ones.
        self.open_quarters(&bytes[128..192]);
        for (low, codes) in
            bytes[..128].as_chunks::<64>().0.iter().zip(self.codes.as_chunks_mut::<128>().0)
        {
            let (first, last) = codes.split_at_mut(64);
            for ((byte, first), last) in low.iter().zip(first).zip(last) {
                *first = byte & 15 | *first << 4;
                *last = byte >> 4 | *last << 4;
            }
        }
        for s in 0..16 {
            self.scales[s] = bytes[192 + s] as i8;
        }
        self.d = u16::from_le_bytes([bytes[208], bytes[209]]);
    }

    fn open_iq4_xs(&mut self, bytes: &[u8]) {
        self.d = u16::from_le_bytes([bytes[0], bytes[1]]);
        let high = u16::from_le_bytes([bytes[2], bytes[3]]);
        for s in 0..8 {
            let low = (bytes[4 + s / 2] >> (4 * (s % 2))) & 15;
            let high = (high >> (2 * s)) as u8 & 3;
            self.scales[s] = (low | high << 4) as i8 - 32;
        }
        for (pair, out) in bytes[8..136].chunks_exact(16).zip(self.codes.chunks_exact_mut(32)) {
            split_nibbles(pair, out);
        }
    }

    /// Two bits an element: byte `i` of a half holds elements i, i + 32, i + 64, i + 96.
    fn open_quarters(&mut self, bytes: &[u8]) {
        for (s, codes) in self.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (code, byte) in codes.iter_mut().zip(&bytes[s / 4 * 32..]) {
                *code = (byte >> (2 * (s % 4))) & 3;
            }
        }
    }

    /// Four bits an element: 32 bytes hold two sub-blocks, the first in the low nibbles.
    fn open_pairs(&mut self, bytes: &[u8]) {
        for (pair, out) in bytes.chunks_exact(32).zip(self.codes.chunks_exact_mut(64)) {
            split_nibbles(pair, out);
        }
    }

    /// Six bits each for eight scales and eight mins, in twelve bytes.
    fn open_scales_and_mins(&mut self, bytes: &[u8]) {
        for s in 0..4 {
            let (scale, min, both) = (bytes[s], bytes[s + 4], bytes[s + 8]);
            self.scales[s] = (scale & 63) as i8;
            self.mins[s] = min & 63;
            self.scales[s + 4] = (both & 15 | (scale >> 2) & 48) as i8;
            self.mins[s + 4] = both >> 4 | (min >> 2) & 48;
        }
    }
}

/// The low nibbles of `bytes`, then the high ones.
fn split_nibbles(bytes: &[u8], out: &mut [u8]) {
    let (low, high) = out.split_at_mut(bytes.len());
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

/// Elements that share a scale.
pub(crate) const fn sub_len(format: Format) -> usize {
    match format {
        Format::Q2_K | Format::Q3_K | Format::Q6_K => 16,
        _ => 32,
    }
}

/// Whether a minimum is subtracted from each element.
pub(crate) const fn has_mins(format: Format) -> bool {
    matches!(format, Format::Q4_1 | Format::Q5_1 | Format::Q2_K | Format::Q4_K | Format::Q5_K)
}

/// The code that means zero.
pub(crate) const fn zero_point(format: Format) -> i32 {
    match format {
        Format::Q4_0 => 8,
        Format::Q5_0 => 16,
        Format::Q8_0 => 128,
        Format::Q3_K => 4,
        Format::Q6_K => 32,
        _ => 0,
    }
}

/// The integer that a code stands for.
pub(crate) fn level(format: Format, code: u8) -> i32 {
    match format {
        Format::IQ4_NL | Format::IQ4_XS => IQ4_LEVELS[usize::from(code & 15)].into(),
        _ => i32::from(code) - zero_point(format),
    }
}

/// The levels of the non-uniform four-bit formats.
pub(crate) const IQ4_LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Elements of the longest block.
pub(crate) const MAX_BLOCK_LEN: usize = 256;

const SIGN: u16 = 0x8000;
