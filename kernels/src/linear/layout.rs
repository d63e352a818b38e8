//! How the rows of a quantized panel are interleaved.
//!
//! A panel is [`PANEL`] rows. Its columns go in steps of 32. A step holds the scales of all rows
//! and then their codes; formats whose scales have scales ("nested") put the outer ones, binary16,
//! in front of every eight steps. Lane `r` of a vector is row `r` throughout:
//!
//! ```text
//! nested   (d: 32 x f16) (dmin: 32 x f16)?  then 8 steps
//! step     nested: (scale: 32 x i8) for each sub-block, (min: 32 x u8)? for each sub-block
//!          flat:   (d: 32 x f16) (dmin: 32 x f16)?
//!          codes of rows 0..16, codes of rows 16..32
//! codes    8 bits: 8 groups of 4 columns, each 16 rows x 4 bytes
//!          4 bits: 4 such vectors, group g in the low and g + 4 in the high nibbles
//!          6 bits: the high four bits as above, then 2 vectors with the low two bits of the
//!                  groups 4 v .. 4 v + 4, the first of them lowest
//! ```
//!
//! Codes are biased so that zero is the middle of their range (8, 32 or 128), unless the format
//! has minimums: then zero is zero.

use crate::format::{Format, has_mins, sub_len, zero_point};

/// Rows of a panel.
pub(crate) const PANEL: usize = 32;

/// Bits in which codes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    Four,
    /// Four bits that index [`crate::format::IQ4_LEVELS`].
    Levels,
    Six,
    Eight,
}

/// The shape of a quantized panel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub bits: Bits,
    /// Columns that share a scale: 16 or 32.
    pub sub_len: usize,
    pub mins: bool,
    pub nested: bool,
    /// What is added to a code of the format before it is stored.
    pub bias: u8,
}

impl Layout {
    /// The layout of a format; none for floats.
    pub fn of(format: Format) -> Option<Layout> {
        let bits = match format {
            Format::F32 | Format::F16 | Format::BF16 => return None,
            Format::Q4_0 | Format::Q4_1 | Format::Q4_K | Format::Q2_K | Format::Q3_K => Bits::Four,
            Format::Q5_0 | Format::Q5_1 | Format::Q5_K | Format::Q6_K => Bits::Six,
            Format::IQ4_NL | Format::IQ4_XS => Bits::Levels,
            Format::Q8_0 => Bits::Eight,
        };
        let mins = has_mins(format);
        let bias = match bits {
            Bits::Levels => 0,
            _ if mins => 0,
            _ => bits.middle() - zero_point(format),
        };
        let nested = format.block_len() > STEP;
        Some(Layout { bits, sub_len: sub_len(format), mins, nested, bias: bias as u8 })
    }

    /// Bytes in front of every eight steps.
    pub fn header_bytes(&self) -> usize {
        if self.nested { 2 * PANEL * (1 + usize::from(self.mins)) } else { 0 }
    }

    /// Bytes of a step's scales and minimums.
    pub fn scale_bytes(&self) -> usize {
        let each = if self.nested { PANEL * STEP / self.sub_len } else { 2 * PANEL };
        each * (1 + usize::from(self.mins))
    }

    /// Bytes of a step's codes.
    pub fn code_bytes(&self) -> usize {
        PANEL * self.bits.vectors() * 4
    }

    /// Bytes of a step.
    pub fn step_bytes(&self) -> usize {
        self.scale_bytes() + self.code_bytes()
    }

    /// Steps behind one header, or one where there are none.
    pub fn group(&self) -> usize {
        if self.nested { NEST } else { 1 }
    }

    /// Bytes of a panel with this many columns.
    pub fn panel_bytes(&self, cols: usize) -> usize {
        let groups = cols / (STEP * self.group());
        groups * (self.header_bytes() + self.group() * self.step_bytes())
    }

    /// The stored code that means zero.
    pub fn zero(&self) -> i32 {
        if self.mins { 0 } else { self.bits.middle() }
    }
}

impl Bits {
    /// Vectors of 16 rows x 4 bytes that hold the codes of 16 rows x 32 columns.
    pub fn vectors(self) -> usize {
        match self {
            Bits::Four | Bits::Levels => 4,
            Bits::Six => 6,
            Bits::Eight => 8,
        }
    }

    fn middle(self) -> i32 {
        match self {
            Bits::Four => 8,
            Bits::Levels => 0,
            Bits::Six => 32,
            Bits::Eight => 128,
        }
    }
}

/// Columns of a step.
pub(crate) const STEP: usize = 32;

/// Steps of a block with nested scales.
pub(crate) const NEST: usize = 8;
