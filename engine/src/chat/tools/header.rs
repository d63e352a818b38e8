//! The beginning of a call in JSON: everything before the value of its arguments.

/// What is known of a call so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// More text is needed.
    Incomplete,
    /// This is no call.
    Malformed,
    /// The name, and where the arguments start or where the object without arguments ends.
    Call { name: String, arguments: Arguments },
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Arguments {
    /// Their value starts at this byte.
    At(usize),
    /// They stand before the name, as this text; the next key or the end starts at this byte.
    Before { text: String, at: usize },
    /// The object ended at this byte without any.
    None { end: usize },
}

/// Reads `text`, which starts with `{`.
pub(super) fn read(text: &str) -> Header {
    let mut at = 1;
    let (mut name, mut before) = (None, None);
    loop {
        at = skip_space(text, at);
        match text.as_bytes().get(at) {
            None => return Header::Incomplete,
            Some(b'}') => {
                return match (name, before) {
                    (Some(name), Some(text)) => {
                        Header::Call { name, arguments: Arguments::Before { text, at } }
                    }
                    (Some(name), None) => {
                        Header::Call { name, arguments: Arguments::None { end: at + 1 } }
                    }
                    (None, _) => Header::Malformed,
                };
            }
            Some(b',') => {
                at += 1;
                continue;
            }
            Some(b'"') => {}
            Some(_) => return Header::Malformed,
        }
        let Some(key_end) = value_end(text, at) else { return Header::Incomplete };
        let Ok(key) = serde_json::from_str::<String>(&text[at..key_end]) else {
            return Header::Malformed;
        };
        at = skip_space(text, key_end);
        match text.as_bytes().get(at) {
            None => return Header::Incomplete,
            Some(b':') => at = skip_space(text, at + 1),
            Some(_) => return Header::Malformed,
        }
        if at == text.len() {
            return Header::Incomplete;
        }
        let is_arguments = key == "arguments" || key == "parameters";
        if is_arguments && let Some(name) = name {
            return Header::Call { name, arguments: Arguments::At(at) };
        }
        let Some(end) = value_end(text, at) else { return Header::Incomplete };
        match key.as_str() {
            "name" => match serde_json::from_str::<String>(&text[at..end]) {
                Ok(text) if !text.is_empty() => name = Some(text),
                _ => return Header::Malformed,
            },
            _ if is_arguments => before = Some(text[at..end].to_owned()),
            _ => {}
        }
        at = end;
        if let (Some(name), Some(text)) = (&name, &before) {
            let (name, text) = (name.clone(), text.clone());
            return Header::Call { name, arguments: Arguments::Before { text, at } };
        }
    }
}

/// Where the JSON value at `start` ends; `None` when it is not complete.
pub(super) fn value_end(text: &str, start: usize) -> Option<usize> {
    let mut scan = ValueScan::default();
    text.as_bytes()[start..].iter().enumerate().find_map(|(i, &byte)| match scan.push(byte) {
        Step::Inside => None,
        Step::EndsWith => Some(start + i + 1),
        Step::EndedBefore => Some(start + i),
    })
}

/// Finds the end of a JSON value byte by byte, without checking what is in it.
#[derive(Debug, Default, Clone)]
pub(super) struct ValueScan {
    depth: usize,
    in_string: bool,
    escaped: bool,
    started: bool,
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(super) enum Step {
    Inside,
    /// This byte is the value's last.
    EndsWith,
    /// This byte is behind the value (a number or a word has no mark at its end).
    EndedBefore,
}

impl ValueScan {
    pub(super) fn push(&mut self, byte: u8) -> Step {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => {
                    self.in_string = false;
                    return self.closed();
                }
                _ => {}
            }
            return Step::Inside;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' if self.depth == 0 => return Step::EndedBefore,
            b'}' | b']' => {
                self.depth -= 1;
                return self.closed();
            }
            b',' | b' ' | b'\n' | b'\r' | b'\t' if self.depth == 0 && self.started => {
                return Step::EndedBefore;
            }
            _ => {}
        }
        self.started = true;
        Step::Inside
    }

    fn closed(&mut self) -> Step {
        self.started = true;
        if self.depth == 0 { Step::EndsWith } else { Step::Inside }
    }
}

fn skip_space(text: &str, at: usize) -> usize {
    let space = text.as_bytes()[at..].iter().take_while(|b| b.is_ascii_whitespace()).count();
    at + space
}
