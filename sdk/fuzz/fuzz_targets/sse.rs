//! A stream of events, cut anywhere: the parser gives what a plain reading of the whole text gives,
//! and refuses exactly what is too long, wherever the cuts are.
//!
//! Two bytes say how much the parser may hold, one how many cuts there are; each cut is a byte, the
//! length of a piece. The rest is the text; after the last cut it comes whole.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sse::{EVENT_BYTES_MAX, Frame, Parser};

#[path = "../../src/sse.rs"]
mod sse;

fuzz_target!(|bytes: &[u8]| {
    let Some((&[low, high, cuts], rest)) = bytes.split_first_chunk::<3>() else { return };
    let (cuts, text) = rest.split_at(usize::from(cuts).min(rest.len()));
    let bytes_max = usize::from(u16::from_le_bytes([low, high]));

    let whole = parse(text, &[], EVENT_BYTES_MAX);
    assert_eq!(whole, (plain(text), true), "a text this small is never too long");
    assert_eq!(parse(text, cuts, EVENT_BYTES_MAX), whole, "cut");

    let bounded = parse(text, &[], bytes_max);
    assert_eq!(parse(text, cuts, bytes_max), bounded, "cut and bounded");
    let (frames, complete) = bounded;
    assert!(whole.0.starts_with(&frames), "what comes before the error is right");
    assert!(complete || text.len() > bytes_max, "refused without a reason");
    assert!(!complete || frames == whole.0, "events were lost");
    for frame in frames {
        // what is no UTF-8 takes three bytes for each
        let id = frame.id.map_or(0, |id| id.len());
        assert!(frame.name.len() + frame.data.len() + id <= 3 * bytes_max, "held more");
    }
});

/// The events of `text`, which comes in pieces, and whether none was too long.
fn parse(mut text: &[u8], cuts: &[u8], bytes_max: usize) -> (Vec<Frame>, bool) {
    let (mut parser, mut out) = (Parser::new(bytes_max), Vec::new());
    for &cut in cuts {
        let (piece, rest) = text.split_at(usize::from(cut).min(text.len()));
        if parser.push(piece, &mut out).is_err() {
            return (out, false);
        }
        text = rest;
    }
    let complete = parser.push(text, &mut out).is_ok();
    (out, complete)
}

/// The same by the text of the standard, which needs the whole stream at once.
fn plain(text: &[u8]) -> Vec<Frame> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let (mut frames, mut name, mut id, mut data) = (Vec::new(), &b""[..], None, Vec::new());
    for line in ended_lines(text) {
        if line.is_empty() {
            if !data.is_empty() {
                let data: Vec<u8> = data.join(&b'\n');
                frames.push(Frame { name: lossy(name), id: id.map(lossy), data: lossy(&data) });
            }
            (name, id, data) = (b"", None, Vec::new());
            continue;
        }
        let mut halves = line.splitn(2, |&byte| byte == b':');
        let field = halves.next().unwrap_or_default();
        let value = halves.next().unwrap_or_default();
        let value = if value.starts_with(b" ") { &value[1..] } else { value };
        match field {
            b"event" => name = value,
            b"data" => data.push(value),
            b"id" if !value.contains(&b'\0') => id = Some(value),
            _ => {}
        }
    }
    frames
}

/// Lines that end with CR LF, LF or CR; what comes after the last end is no line.
fn ended_lines(text: &[u8]) -> Vec<&[u8]> {
    let (mut lines, mut begin, mut at) = (Vec::new(), 0, 0);
    while at < text.len() {
        let width = match (text[at], text.get(at + 1)) {
            (b'\r', Some(b'\n')) => 2,
            (b'\r' | b'\n', _) => 1,
            _ => {
                at += 1;
                continue;
            }
        };
        lines.push(&text[begin..at]);
        at += width;
        begin = at;
    }
    lines
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
