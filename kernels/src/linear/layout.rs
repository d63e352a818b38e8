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
//!          codes
//! codes    8 bits: for each of 8 groups of 4 columns, 32 rows x 4 bytes
//!          4 bits: 4 such pieces, group g in the low and g + 4 in the high nibbles
//!          5 bits: the high four bits as above, then one piece with the low bits, of group g in
//!                  bit g
//!          6 bits: the high four bits as above, then 2 pieces with the low two bits of the
//!                  groups 4 v .. 4 v + 4, the first of them lowest
//! ```
//!
//! Codes are biased so that zero is the middle of their range (8, 16, 32 or 128), unless the format
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
    Five,
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
    pub const fn of(format: Format) -> Option<Layout> {
        let bits = match format {
            Format::F32 | Format::F16 | Format::BF16 => return None,
            Format::Q4_0 | Format::Q4_1 | Format::Q4_K | Format::Q2_K | Format::Q3_K => Bits::Four,
            Format::Q5_0 | Format::Q5_1 | Format::Q5_K => Bits::Five,
            Format::Q6_K => Bits::Six,
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
    pub const fn header_bytes(&self) -> usize {
        if self.nested { 2 * PANEL * (1 + self.mins as usize) } else { 0 }
    }

    /// Bytes of a step's scales and minimums.
    pub const fn scale_bytes(&self) -> usize {
        let each = if self.nested { PANEL * STEP / self.sub_len } else { 2 * PANEL };
        each * (1 + self.mins as usize)
    }

    /// Bytes of a step's codes.
    pub const fn code_bytes(&self) -> usize {
        PANEL * self.bits.pieces() * 4
    }

    /// Bytes of a step.
    pub const fn step_bytes(&self) -> usize {
        self.scale_bytes() + self.code_bytes()
    }

    /// Steps behind one header, or one where there are none.
    pub const fn group(&self) -> usize {
        if self.nested { NEST } else { 1 }
    }

    /// Bytes of a panel with this many columns.
    pub const fn panel_bytes(&self, cols: usize) -> usize {
        let groups = cols / (STEP * self.group());
        groups * (self.header_bytes() + self.group() * self.step_bytes())
    }

    /// The stored code that means zero.
    pub const fn zero(&self) -> i32 {
        if self.mins { 0 } else { self.bits.middle() }
    }
}

impl Bits {
    /// Pieces of 32 rows x 4 bytes that hold the codes of a step.
    pub const fn pieces(self) -> usize {
        match self {
            Bits::Four | Bits::Levels => 4,
            Bits::Five => 5,
            Bits::Six => 6,
            Bits::Eight => 8,
        }
    }

    /// What takes back that vector kernels unpack codes to the upper bits of a byte.
    pub const fn unraise(self) -> f32 {
        match self {
            Bits::Four => 1.0 / 16.0,
            Bits::Five => 1.0 / 8.0,
            Bits::Six => 1.0 / 4.0,
            Bits::Levels | Bits::Eight => 1.0,
        }
    }

    const fn middle(self) -> i32 {
        match self {
            Bits::Four => 8,
            Bits::Levels => 0,
            Bits::Five => 16,
            Bits::Six => 32,
            Bits::Eight => 128,
        }
    }
}

/// A layout known at compile time, for kernels that are made for each.
pub(crate) trait Shape {
    const LAYOUT: Layout;
}

/// Evaluates an expression with the [`Shape`] of a quantized format.
macro_rules! with_shape {
    ($format:expr, $shape:ident => $body:expr) => {
        with_shape!($format, $shape => $body,
            Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS)
    };
    ($format:expr, $shape:ident => $body:expr, $($name:ident)*) => {
        match $format {
            $(Format::$name => {
                struct $shape;
                impl $crate::linear::Shape for $shape {
                    const LAYOUT: $crate::linear::Layout =
                        $crate::linear::Layout::of(Format::$name).expect("a quantized format");
                }
                $body
            })*
            Format::F32 | Format::F16 | Format::BF16 => unreachable!("floats have no layout"),
        }
    };
}
pub(crate) use with_shape;

/// Columns of a step.
pub(crate) const STEP: usize = 32;

/// Steps of a block with nested scales.
pub(crate) const NEST: usize = 8;
