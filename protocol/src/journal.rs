//! The journal of a stream: what was drawn so far, in order, so that another replica can go on where
//! one has died. And the parts in which a streamed answer travels between nodes, with what the journal
//! gains by each.
//!
//! Everything that a client sees of a stream follows from its request and its journal. So whoever has
//! both can write the same events again, byte for byte, and go on after any of them.

use bincode::{Decode, Encode};

use crate::TokenId;
use crate::forward::PART_BYTES_MAX;
use crate::wire::{self, DecodeError};

/// What happened to a stream. Choices of all prompts are counted through: `prompt * n + choice`.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Entry {
    /// The first choice of a prompt began, and found so many of the prompt's tokens cached.
    Started { prompt: u32, cached_tokens: u64 },
    /// A token was drawn. Log-probabilities are 0 and empty unless they were asked for.
    Token { choice: u32, token: TokenId, logprob: f32, top: Vec<(TokenId, f32)> },
    /// A choice is complete.
    Finished { choice: u32, reason: Ended },
}

/// Why a choice is complete. The number is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Ended {
    /// An end-of-generation token, a stop string or the grammar's end.
    Stop,
    /// The most tokens asked for, or the context's end.
    Length,
}

/// One part of a streamed answer. Server-sent events and the entries that they were made of travel
/// together, so that whoever receives a part knows exactly what its client has seen.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct StreamPart {
    /// False if the text goes on in the next part; entries come with the last one.
    pub is_whole: bool,
    /// Number of the event after those sent so far, from 0.
    pub next_event: u64,
    pub entries: Vec<Entry>,
    /// Server-sent events.
    pub text: Vec<u8>,
}

impl StreamPart {
    /// The part in pieces that fit the wire.
    pub fn split(self) -> Vec<StreamPart> {
        let pieces = self.text.chunks(PART_BYTES_MAX).map(|text| StreamPart {
            is_whole: false,
            next_event: self.next_event,
            entries: Vec::new(),
            text: text.to_vec(),
        });
        let mut pieces: Vec<StreamPart> = pieces.collect();
        if let Some(last) = pieces.last_mut() {
            (last.is_whole, last.entries) = (true, self.entries);
        }
        pieces
    }

    /// Adds the piece that follows; false if that is not to be awaited, since the part is whole, or if
    /// both are more than a part may be.
    pub fn join(&mut self, next: StreamPart) -> bool {
        let fits = !self.is_whole && self.text.len() + next.text.len() <= TEXT_BYTES_MAX;
        if fits {
            self.text.extend(next.text);
            (self.is_whole, self.next_event) = (next.is_whole, next.next_event);
            self.entries = next.entries;
        }
        fits
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// # Errors
    /// If the bytes are no part, or more than [`STREAM_PART_BYTES_MAX`].
    pub fn from_bytes(bytes: &[u8]) -> Result<StreamPart, DecodeError> {
        wire::decode::<_, STREAM_PART_BYTES_MAX>(bytes)
    }
}

/// The entries of a journal as bytes.
pub fn to_bytes(entries: &[Entry]) -> Vec<u8> {
    wire::encode(&entries)
}

/// # Errors
/// If the bytes are no journal, or more than [`JOURNAL_BYTES_MAX`].
pub fn from_bytes(bytes: &[u8]) -> Result<Vec<Entry>, DecodeError> {
    wire::decode::<_, JOURNAL_BYTES_MAX>(bytes)
}

/// Bytes of a journal, in memory or on the wire: some 400,000 tokens without log-probabilities. A stream
/// that outgrows it is no longer continued.
pub const JOURNAL_BYTES_MAX: usize = 16 << 20;
/// Bytes of the text of a part whose pieces came one after the other.
const TEXT_BYTES_MAX: usize = 16 << 20;
/// Bytes of one part on the wire: 64 KiB of events and the entries of as many tokens as are written in one go.
pub const STREAM_PART_BYTES_MAX: usize = 512 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<Entry> {
        vec![
            Entry::Started { prompt: 0, cached_tokens: 16 },
            Entry::Token { choice: 1, token: 300, logprob: -0.5, top: vec![(7, -1.0)] },
            Entry::Finished { choice: 1, reason: Ended::Length },
        ]
    }

    #[test]
    fn golden() {
        let part = StreamPart {
            is_whole: true,
            next_event: 2,
            entries: entries(),
            text: b"data: x\n\n".to_vec(),
        };
        let half = (-0.5f32).to_le_bytes();
        let one = (-1.0f32).to_le_bytes();
        let mut bytes = vec![1, 2, 3, 0, 0, 16, 1, 1, 251, 44, 1];
        bytes.extend(half);
        bytes.extend([1, 7]);
        bytes.extend(one);
        bytes.extend([2, 1, 1, 9]);
        bytes.extend(b"data: x\n\n");
        assert_eq!(part.to_bytes(), bytes);
        assert_eq!(StreamPart::from_bytes(&bytes), Ok(part));
        let journal = to_bytes(&entries());
        assert_eq!(journal, bytes[2..bytes.len() - 10]);
        assert_eq!(from_bytes(&journal), Ok(entries()));
    }

    #[test]
    fn long_text_travels_in_pieces() {
        let text: Vec<u8> = (0..PART_BYTES_MAX * 2 + 5).map(|i| i as u8).collect();
        let whole = StreamPart { is_whole: true, next_event: 9, entries: entries(), text };
        let mut pieces = whole.clone().split().into_iter();
        let mut joined = pieces.next().unwrap();
        assert!(!joined.is_whole && joined.entries.is_empty());
        for piece in pieces {
            assert!(piece.to_bytes().len() < STREAM_PART_BYTES_MAX);
            assert!(joined.join(piece));
        }
        assert_eq!(joined, whole);
        assert!(!joined.clone().join(whole), "it is whole");
    }

    #[test]
    fn damaged_bytes_are_errors() {
        let bytes = to_bytes(&entries());
        for end in 0..bytes.len() {
            assert!(from_bytes(&bytes[..end]).is_err(), "{end}");
            for value in 0..=255 {
                let mut bytes = bytes.clone();
                bytes[end] = value;
                let _ = from_bytes(&bytes);
                let _ = StreamPart::from_bytes(&bytes);
            }
        }
        // Claims 2^60 entries.
        assert!(from_bytes(&[253, 0, 0, 0, 0, 0, 0, 0, 16]).is_err());
        assert!(StreamPart::from_bytes(&vec![0; STREAM_PART_BYTES_MAX + 1]).is_err());
    }
}
