//! Metadata values, borrowed from the file.

use std::fmt;

use super::cursor::Cursor;
use crate::weights::ModelError;

/// One value. Numbers keep their sign and kind, not their width.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::weights) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    /// Not checked to be UTF-8.
    String(&'a [u8]),
    Array(Array<'a>),
}

/// Elements of one kind, whose bytes are known to be there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::weights) struct Array<'a> {
    kind: Kind,
    len: usize,
    bytes: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl<'a> Value<'a> {
    /// A whole number that is not negative.
    pub fn size(&self) -> Option<usize> {
        match *self {
            Value::Unsigned(n) => usize::try_from(n).ok(),
            Value::Signed(n) => usize::try_from(n).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn number(&self) -> Option<f64> {
        match *self {
            Value::Unsigned(n) => Some(n as f64),
            Value::Signed(n) => Some(n as f64),
            Value::Float(n) => Some(n),
            _ => None,
        }
    }

    pub fn bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(b) => Some(b),
            _ => None,
        }
    }

    /// A string, if it is UTF-8.
    pub fn text(&self) -> Option<&'a str> {
        match *self {
            Value::String(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    pub fn array(&self) -> Option<Array<'a>> {
        match *self {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }
}

impl<'a> Array<'a> {
    pub fn len(&self) -> usize {
        self.len
    }

    /// The numbers, each of the array's width; none for other kinds.
    pub fn numbers(&self) -> Option<impl Iterator<Item = Value<'a>> + use<'a>> {
        let (kind, size) = (self.kind, self.kind.size()?);
        Some(self.bytes.chunks_exact(size).map(move |bytes| scalar(kind, bytes)))
    }

    /// The strings, unchecked; none for other kinds.
    pub fn strings(&self) -> Option<impl Iterator<Item = &'a [u8]> + use<'a>> {
        let mut rest = self.bytes;
        let is = self.kind == Kind::String;
        is.then(|| {
            std::iter::from_fn(move || {
                let (len, tail) = rest.split_first_chunk::<8>()?;
                let (string, tail) = tail.split_at_checked(u64::from_le_bytes(*len) as usize)?;
                rest = tail;
                Some(string)
            })
        })
    }
}

/// Reads the value of `key`.
pub(super) fn read<'a>(cursor: &mut Cursor<'a>, key: &str) -> Result<Value<'a>, ModelError> {
    let what = format_args!("the value of `{key}`");
    let kind = kind(cursor, key)?;
    match (kind, kind.size()) {
        (Kind::String, _) => Ok(Value::String(cursor.string(&what)?)),
        (Kind::Array, _) => Ok(Value::Array(array(cursor, key, 0)?)),
        (_, size) => {
            let bytes = cursor.take(size.unwrap_or(0) as u64, &what)?;
            if kind == Kind::Bool && bytes[0] > 1 {
                return Err(cursor.refuse(format!("{what} is a boolean that is not 0 or 1")));
            }
            Ok(scalar(kind, bytes))
        }
    }
}

fn array<'a>(cursor: &mut Cursor<'a>, key: &str, depth: u32) -> Result<Array<'a>, ModelError> {
    let what = format_args!("the array of `{key}`");
    if depth == ARRAY_DEPTH_MAX {
        let sentence = format!("{what} is nested more than {ARRAY_DEPTH_MAX} deep");
        return Err(cursor.refuse(sentence));
    }
    let kind = kind(cursor, key)?;
    let len = cursor.u64(what)?;
    let start = cursor.rest();
    match kind {
        Kind::String => {
            for _ in 0..len {
                cursor.string(&what)?;
            }
        }
        Kind::Array => {
            for _ in 0..len {
                array(cursor, key, depth + 1)?;
            }
        }
        _ => {
            let size = kind.size().unwrap_or(0) as u64;
            cursor.take(len.saturating_mul(size), &what)?;
        }
    }
    let read = start.len() - cursor.rest().len();
    Ok(Array { kind, len: len as usize, bytes: &start[..read] })
}

fn kind(cursor: &mut Cursor<'_>, key: &str) -> Result<Kind, ModelError> {
    let id = cursor.u32(format_args!("the type of `{key}`"))?;
    let kind = KINDS.get(id as usize).copied();
    kind.ok_or_else(|| cursor.refuse(format!("`{key}` has the unknown value type {id}")))
}

/// `bytes` has the size of `kind`.
fn scalar<'a>(kind: Kind, bytes: &'a [u8]) -> Value<'a> {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let unsigned = u64::from_le_bytes(wide);
    // Shifting up and down again spreads the sign.
    let unused = 64 - 8 * bytes.len() as u32;
    match kind {
        Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => {
            Value::Signed((unsigned << unused) as i64 >> unused)
        }
        Kind::F32 => Value::Float(f32::from_bits(unsigned as u32).into()),
        Kind::F64 => Value::Float(f64::from_bits(unsigned)),
        Kind::Bool => Value::Bool(unsigned != 0),
        _ => Value::Unsigned(unsigned),
    }
}

impl Kind {
    /// Bytes of a number; none for strings and arrays.
    fn size(self) -> Option<usize> {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => Some(1),
            Kind::U16 | Kind::I16 => Some(2),
            Kind::U32 | Kind::I32 | Kind::F32 => Some(4),
            Kind::U64 | Kind::I64 | Kind::F64 => Some(8),
            Kind::String | Kind::Array => None,
        }
    }
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Unsigned(n) => write!(f, "{n}"),
            Value::Signed(n) => write!(f, "{n}"),
            Value::Float(n) => write!(f, "{n}"),
            Value::Bool(b) => write!(f, "{b}"),
            Value::String(bytes) => {
                let shown = &bytes[..bytes.len().min(SHOWN_BYTES_MAX)];
                write!(f, "{:?}", String::from_utf8_lossy(shown))
            }
            Value::Array(array) => write!(f, "an array of {}", array.len),
        }
    }
}

/// Arrays inside arrays.
const ARRAY_DEPTH_MAX: u32 = 4;
/// Of a string in an error.
const SHOWN_BYTES_MAX: usize = 80;
/// By the id in the file.
const KINDS: [Kind; 13] = [
    Kind::U8,
    Kind::I8,
    Kind::U16,
    Kind::I16,
    Kind::U32,
    Kind::I32,
    Kind::F32,
    Kind::Bool,
    Kind::String,
    Kind::Array,
    Kind::U64,
    Kind::I64,
    Kind::F64,
];
