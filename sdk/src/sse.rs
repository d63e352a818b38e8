//! Server-sent events from bytes (WHATWG HTML, section 9.2), however they are cut.
//!
//! Owns the syntax: lines, fields, where an event ends. Refuses events that are larger than a bound, and
//! knows nothing of what they mean.

/// One event. What its stream did not end is no event and never appears.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Empty for an event without a name.
    pub name: String,
    /// This event's own id; unlike in a browser, the one before it is not inherited.
    pub id: Option<String>,
    /// Lines of `data`, joined by line feeds; what is no UTF-8 is replaced.
    pub data: String,
}

/// Puts events together. Holds at most a given number of bytes.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    bytes_max: usize,
    line: Vec<u8>,
    /// A carriage return ended the last line: a line feed that follows belongs to it.
    after_return: bool,
    /// The first line has been read, before which a byte order mark may stand.
    begun: bool,
    name: Vec<u8>,
    id: Option<Vec<u8>>,
    data: Option<Vec<u8>>,
}

/// An event has more bytes than the parser holds, which is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of more than {0} bytes")]
pub(crate) struct TooLong(usize);

impl Parser {
    /// Takes events of at most so many bytes; [`EVENT_BYTES_MAX`] is enough for nodes.
    pub fn new(bytes_max: usize) -> Self {
        Parser { bytes_max, ..Parser::default() }
    }

    /// Reads on; complete events are appended to `out`.
    ///
    /// # Errors
    /// If an event is too long; those before it are in `out`.
    pub fn push(&mut self, mut bytes: &[u8], out: &mut Vec<Frame>) -> Result<(), TooLong> {
        while let Some(&first) = bytes.first() {
            if std::mem::take(&mut self.after_return) && first == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let end = bytes.iter().position(|b| matches!(b, b'\n' | b'\r'));
            let (part, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
            if self.held() + part.len() > self.bytes_max {
                return Err(TooLong(self.bytes_max));
            }
            self.line.extend_from_slice(part);
            bytes = rest;
            if let Some((end, rest)) = rest.split_first() {
                self.after_return = *end == b'\r';
                bytes = rest;
                let line = std::mem::take(&mut self.line);
                out.extend(self.end_line(&line));
            }
        }
        Ok(())
    }

    /// Bytes kept.
    fn held(&self) -> usize {
        let len = |bytes: &Option<Vec<u8>>| bytes.as_ref().map_or(0, Vec::len);
        self.line.len() + self.name.len() + len(&self.id) + len(&self.data)
    }

    fn end_line(&mut self, line: &[u8]) -> Option<Frame> {
        let is_first = !std::mem::replace(&mut self.begun, true);
        let line = match line.strip_prefix(BYTE_ORDER_MARK) {
            Some(rest) if is_first => rest,
            _ => line,
        };
        if line.is_empty() {
            return self.end_event();
        }
        let colon = line.iter().position(|b| *b == b':').unwrap_or(line.len());
        let (field, value) = line.split_at(colon);
        let value = value.strip_prefix(b":").unwrap_or(value);
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match field {
            b"data" => match &mut self.data {
                Some(data) => {
                    data.push(b'\n');
                    data.extend_from_slice(value);
                }
                None => self.data = Some(value.to_vec()),
            },
            b"event" => self.name = value.to_vec(),
            b"id" if !value.contains(&0) => self.id = Some(value.to_vec()),
            // A comment (no field before the colon), or nothing that is known.
            _ => {}
        }
        None
    }

    fn end_event(&mut self) -> Option<Frame> {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let name = text(std::mem::take(&mut self.name));
        let id = self.id.take().map(text);
        // An event without data is none.
        Some(Frame { name, id, data: text(self.data.take()?) })
    }
}

/// Bytes that one event may take. Generous: `/v1/completions` with `echo` repeats the prompt in one event,
/// and a node takes 16 MiB of request.
pub(crate) const EVENT_BYTES_MAX: usize = 32 << 20;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(name: &str, id: Option<&str>, data: &str) -> Frame {
        Frame { name: name.to_owned(), id: id.map(str::to_owned), data: data.to_owned() }
    }

    /// The events of a text, cut into pieces of `piece` bytes.
    fn parse(text: &[u8], piece: usize) -> Vec<Frame> {
        let (mut parser, mut out) = (Parser::new(EVENT_BYTES_MAX), Vec::new());
        for piece in text.chunks(piece) {
            parser.push(piece, &mut out).unwrap();
        }
        out
    }

    #[test]
    fn lines_fields_and_ends() {
        for (text, expect) in [
            ("id: a:0\ndata: {}\n\n", vec![frame("", Some("a:0"), "{}")]),
            ("event: error\ndata: x\n\n", vec![frame("error", None, "x")]),
            (": keep-alive\n\ndata: x\n\n", vec![frame("", None, "x")]),
            ("data: a\ndata:b\ndata\n\n", vec![frame("", None, "a\nb\n")]),
            ("data:  two spaces\n\n", vec![frame("", None, " two spaces")]),
            (
                "data: a\r\n\r\ndata: b\r\rdata: c\n\n",
                vec![frame("", None, "a"), frame("", None, "b"), frame("", None, "c")],
            ),
            ("\u{feff}data: x\n\n", vec![frame("", None, "x")]),
            ("data: x\n\u{feff}data: y\n\n", vec![frame("", None, "x")]),
            ("id: a\n\ndata: x\n\n", vec![frame("", None, "x")]),
            ("id: a\0b\ndata: x\n\n", vec![frame("", None, "x")]),
            ("retry: 5\nnonsense: 1\ndata: x\n\n", vec![frame("", None, "x")]),
            // The last one has no end: it is none.
            ("data: x\n\ndata: y\n", vec![frame("", None, "x")]),
            ("data\n\n", vec![frame("", None, "")]),
            ("", vec![]),
        ] {
            for piece in 1..=text.len().max(1) {
                assert_eq!(parse(text.as_bytes(), piece), expect, "{text:?} in pieces of {piece}");
            }
        }
        assert_eq!(parse(b"data: \xff\xfe\n\n", 3), [frame("", None, "\u{fffd}\u{fffd}")]);
    }

    #[test]
    fn garbage_never_panics() {
        let good = b"id: req-0:0\nevent: error\r\ndata: {\"a\": 1}\n\n: comment\ndata: [DONE]\n\n";
        for at in 0..good.len() {
            for value in 0..=255 {
                let mut text = good.to_vec();
                text[at] = value;
                // However it is cut, it is the same.
                assert_eq!(parse(&text, 1), parse(&text, text.len()), "byte {at} is {value}");
            }
        }
    }

    #[test]
    fn what_never_ends_is_refused() {
        for piece in ["data: x", "x", "id: 1", "data: x\n", ": ", "event: e"] {
            let (mut parser, mut out) = (Parser::new(1000), Vec::new());
            let mut pushed = (0..10_000).map(|_| parser.push(piece.as_bytes(), &mut out));
            assert_eq!(pushed.find(Result::is_err), Some(Err(TooLong(1000))), "{piece:?}");
            assert!(out.is_empty() && parser.held() <= 1000, "{piece:?}");
        }
        // What ends is not held.
        let (mut parser, mut out) = (Parser::new(100), Vec::new());
        for _ in 0..1000 {
            parser.push(b": comment\nid: 1\ndata: x\n\nid: 2\nid: 3\n", &mut out).unwrap();
        }
        assert_eq!(out.len(), 1000);
    }
}
