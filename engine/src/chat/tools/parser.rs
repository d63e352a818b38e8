use super::ToolFormat;
use super::header::{self, Arguments, Header, Step, ValueScan};

/// What the text of a model turned out to be, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolEvent {
    /// Text for the reader.
    Content(String),
    /// A call begins. `index` counts from 0 within the answer.
    Start { index: u32, id: String, name: String },
    /// More of the JSON text of the arguments of call `index`.
    Arguments { index: u32, delta: String },
}

/// Reads calls from the text of an answer as it comes.
///
/// No part of a marker is ever given out as content: what may become one is held back until it is
/// decided. What looks like a call and is none comes out as content, whole.
#[derive(Debug, Clone)]
pub struct ToolParser {
    format: ToolFormat,
    names: Vec<String>,
    id_key: [u8; 32],
    state: State,
    /// Text that is not decided yet.
    held: String,
    calls: u32,
    any_content: bool,
}

#[derive(Debug, Clone)]
enum State {
    /// Between calls, or before the first.
    Text,
    /// At or before the `{` of a call; `held` starts with `prefix` bytes of marker.
    Head { prefix: usize },
    /// After `[TOOL_CALLS]`, before it is known which of Mistral's forms follows.
    MistralHead { prefix: usize },
    /// In the arguments' value.
    Arguments { scan: ValueScan, text: Option<String>, after: After },
    /// Behind the arguments, up to the end of the call's object.
    Tail { depth: usize, in_string: bool, escaped: bool },
    /// Behind the call's object.
    Closed,
    /// Behind the last call of a list: the rest is noise.
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// The object that the arguments are a field of goes on.
    Object,
    /// The arguments are the whole of the call.
    Nothing,
}

impl ToolParser {
    /// `names` are the functions on offer: for the Llama form, JSON that names none of them is
    /// content. `id_key` makes the ids of calls: the same key gives the same ids.
    pub fn new(format: ToolFormat, names: Vec<String>, id_key: &[u8]) -> Self {
        Self {
            format,
            names,
            id_key: *blake3::hash(id_key).as_bytes(),
            state: State::Text,
            held: String::new(),
            calls: 0,
            any_content: false,
        }
    }

    /// How many calls have begun.
    pub fn calls(&self) -> u32 {
        self.calls
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> Vec<ToolEvent> {
        self.held.push_str(text);
        let mut events = Vec::new();
        while self.step(&mut events) {}
        events
    }

    /// The text ended: what is held back was content after all, or the rest of a marker.
    pub fn finish(&mut self) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        let held = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Done) {
            State::Text | State::Head { .. } | State::MistralHead { .. }
                if self.calls == 0 || !held.trim().is_empty() =>
            {
                self.content(&held, &mut events);
            }
            State::Arguments { text: Some(text), .. } => self.arguments(&text, &mut events),
            _ => {}
        }
        events
    }

    /// Decides a part of what is held; false when more text is needed.
    fn step(&mut self, events: &mut Vec<ToolEvent>) -> bool {
        match &mut self.state {
            State::Text => self.step_text(events),
            State::Head { prefix } => {
                let prefix = *prefix;
                self.step_head(prefix, events)
            }
            State::MistralHead { prefix } => {
                let prefix = *prefix;
                self.step_mistral_head(prefix, events)
            }
            State::Arguments { .. } => self.step_arguments(events),
            State::Tail { .. } => self.step_tail(),
            State::Closed => self.step_closed(),
            State::Done => {
                self.held.clear();
                false
            }
        }
    }

    fn step_text(&mut self, events: &mut Vec<ToolEvent>) -> bool {
        if self.format == ToolFormat::Llama3 {
            return self.step_llama_text(events);
        }
        let marker = self.open_marker();
        if let Some(at) = self.held.find(marker) {
            let before = self.held[..at].trim_end().to_owned();
            self.content(&before, events);
            self.held.drain(..at);
            self.state = match self.format {
                ToolFormat::Hermes => State::Head { prefix: marker.len() },
                _ => State::MistralHead { prefix: marker.len() },
            };
            return true;
        }
        // space before a marker belongs to the call, so it waits with what may become one
        let kept = partial_marker(&self.held, marker);
        let decided = self.held[..self.held.len() - kept].trim_end().len();
        self.emit(decided, events);
        false
    }

    /// The whole answer is calls or it is content: its first characters decide.
    fn step_llama_text(&mut self, events: &mut Vec<ToolEvent>) -> bool {
        if self.any_content {
            self.emit(self.held.len(), events);
            return false;
        }
        let start = self.held.len() - self.held.trim_start().len();
        let rest = &self.held[start..];
        if rest.is_empty() || (PYTHON_TAG.starts_with(rest) && rest.len() < PYTHON_TAG.len()) {
            return false;
        }
        if let Some(after) = rest.strip_prefix(PYTHON_TAG) {
            let space = after.len() - after.trim_start().len();
            if after.len() == space {
                return false;
            }
            self.state = State::Head { prefix: start + PYTHON_TAG.len() };
            return true;
        }
        if rest.starts_with('{') {
            self.state = State::Head { prefix: start };
            return true;
        }
        self.emit(self.held.len(), events);
        false
    }

    /// Waits for the name of the call and the start of its arguments.
    fn step_head(&mut self, prefix: usize, events: &mut Vec<ToolEvent>) -> bool {
        let body = &self.held[prefix..];
        let start = prefix + (body.len() - body.trim_start().len());
        let head = match self.held.as_bytes().get(start) {
            None => Header::Incomplete,
            Some(b'{') => header::read(&self.held[start..]),
            Some(_) => Header::Malformed,
        };
        match head {
            Header::Incomplete if self.held.len() > HEAD_BYTES_MAX => self.not_a_call(events),
            Header::Incomplete => return false,
            Header::Malformed => self.not_a_call(events),
            Header::Call { name, .. } if !self.is_on_offer(&name) => self.not_a_call(events),
            Header::Call { name, arguments } => {
                self.begin(name, events);
                match arguments {
                    Arguments::At(at) => {
                        self.held.drain(..start + at);
                        self.state = in_arguments(After::Object, &self.held);
                    }
                    Arguments::Before { text, at } => {
                        self.held.drain(..start + at);
                        self.arguments(&unquoted(&text), events);
                        self.state = State::Tail { depth: 0, in_string: false, escaped: false };
                    }
                    Arguments::None { end } => {
                        self.held.drain(..start + end);
                        self.arguments("{}", events);
                        self.state = State::Closed;
                    }
                }
            }
        }
        true
    }

    /// `[TOOL_CALLS]` is followed by a list of calls, or by a name.
    fn step_mistral_head(&mut self, prefix: usize, events: &mut Vec<ToolEvent>) -> bool {
        let body = &self.held[prefix..];
        let trimmed = body.trim_start();
        let start = self.held.len() - trimmed.len();
        match trimmed.chars().next() {
            None => return false,
            Some('[') => {
                self.state = State::Head { prefix: start + 1 };
                return true;
            }
            Some(_) => {}
        }
        let Some(end) = trimmed.find(['[', '{']) else {
            if trimmed.len() > HEAD_BYTES_MAX {
                self.not_a_call(events);
                return true;
            }
            return false;
        };
        let name = trimmed[..end].trim().to_owned();
        let Some(open) = trimmed.find('{') else {
            if trimmed.len() > HEAD_BYTES_MAX {
                self.not_a_call(events);
                return true;
            }
            return false;
        };
        let between = trimmed[end..open].trim();
        let known = between.is_empty()
            || between == "[ARGS]"
            || (between.starts_with("[CALL_ID]") && between.ends_with("[ARGS]"));
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || !name.chars().all(plain) || !known {
            self.not_a_call(events);
            return true;
        }
        self.begin(name, events);
        self.held.drain(..start + open);
        self.state = in_arguments(After::Nothing, &self.held);
        true
    }

    /// Gives out the arguments' text as it comes.
    fn step_arguments(&mut self, events: &mut Vec<ToolEvent>) -> bool {
        let State::Arguments { scan, text, after } = &mut self.state else { return false };
        let mut end = None;
        for (i, &byte) in self.held.as_bytes().iter().enumerate() {
            match scan.push(byte) {
                Step::Inside => {}
                Step::EndsWith => end = Some(i + 1),
                Step::EndedBefore => end = Some(i),
            }
            if end.is_some() {
                break;
            }
        }
        let delta: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
        let next = match after {
            After::Object => State::Tail { depth: 0, in_string: false, escaped: false },
            After::Nothing => State::Closed,
        };
        if let Some(text) = text {
            text.push_str(&delta);
            if end.is_some() {
                let whole = unquoted(text);
                self.state = next;
                self.arguments(&whole, events);
                return true;
            }
            return false;
        }
        if end.is_some() {
            self.state = next;
        }
        self.arguments(&delta, events);
        end.is_some()
    }

    /// Skips to the end of the object around the arguments.
    fn step_tail(&mut self) -> bool {
        let State::Tail { depth, in_string, escaped } = &mut self.state else { return false };
        for (i, byte) in self.held.bytes().enumerate() {
            match byte {
                _ if *escaped => *escaped = false,
                b'\\' if *in_string => *escaped = true,
                b'"' => *in_string = !*in_string,
                _ if *in_string => {}
                b'{' | b'[' => *depth += 1,
                b'}' | b']' if *depth == 0 => {
                    self.held.drain(..=i);
                    self.state = State::Closed;
                    return true;
                }
                b'}' | b']' => *depth -= 1,
                _ => {}
            }
        }
        self.held.clear();
        false
    }

    /// Reads what stands between a call and the next.
    fn step_closed(&mut self) -> bool {
        let trimmed = self.held.trim_start();
        let start = self.held.len() - trimmed.len();
        if trimmed.is_empty() {
            return false;
        }
        match self.format {
            ToolFormat::Hermes => {
                if trimmed.starts_with(HERMES_CLOSE) {
                    self.held.drain(..start + HERMES_CLOSE.len());
                } else if HERMES_CLOSE.starts_with(trimmed) {
                    return false;
                }
                // a model that forgets the closing marker still made its call
                self.state = State::Text;
            }
            ToolFormat::Llama3 => match trimmed.as_bytes()[0] {
                b';' | b',' => {
                    self.held.drain(..=start);
                }
                b'{' => self.state = State::Head { prefix: start },
                b'<' if trimmed.starts_with(PYTHON_TAG) => {
                    self.held.drain(..start + PYTHON_TAG.len());
                }
                b'<' if PYTHON_TAG.starts_with(trimmed) => return false,
                _ => self.state = State::Done,
            },
            ToolFormat::MistralArray | ToolFormat::MistralArgs => match trimmed.as_bytes()[0] {
                b',' => {
                    self.held.drain(..=start);
                }
                b'{' => self.state = State::Head { prefix: start },
                b']' => {
                    self.held.drain(..=start);
                    self.state = State::Text;
                }
                _ => self.state = State::Text,
            },
        }
        true
    }

    fn begin(&mut self, name: String, events: &mut Vec<ToolEvent>) {
        let index = self.calls;
        self.calls += 1;
        events.push(ToolEvent::Start { index, id: self.call_id(index), name });
    }

    fn arguments(&mut self, delta: &str, events: &mut Vec<ToolEvent>) {
        if !delta.is_empty() {
            let index = self.calls.saturating_sub(1);
            events.push(ToolEvent::Arguments { index, delta: delta.to_owned() });
        }
    }

    fn content(&mut self, text: &str, events: &mut Vec<ToolEvent>) {
        if !text.is_empty() {
            self.any_content = true;
            events.push(ToolEvent::Content(text.to_owned()));
        }
    }

    fn emit(&mut self, bytes: usize, events: &mut Vec<ToolEvent>) {
        let text: String = self.held.drain(..bytes).collect();
        self.content(&text, events);
    }

    /// What is held looked like a call and is text. A later marker may still begin one.
    fn not_a_call(&mut self, events: &mut Vec<ToolEvent>) {
        let marker = match self.format {
            ToolFormat::Llama3 => self.held.len(),
            _ if self.held.starts_with(self.open_marker()) => self.open_marker().len(),
            // an entry of a list: its first character decides nothing any more
            _ => self.held.chars().next().map_or(0, char::len_utf8),
        };
        self.any_content = true;
        self.emit(marker, events);
        self.state = State::Text;
    }

    fn open_marker(&self) -> &'static str {
        match self.format {
            ToolFormat::Hermes => HERMES_OPEN,
            ToolFormat::Llama3 => PYTHON_TAG,
            ToolFormat::MistralArray | ToolFormat::MistralArgs => MISTRAL_OPEN,
        }
    }

    fn is_on_offer(&self, name: &str) -> bool {
        self.format != ToolFormat::Llama3 || self.names.iter().any(|n| n == name)
    }

    /// Mistral's templates demand nine letters and digits; others take any text.
    fn call_id(&self, index: u32) -> String {
        let digest = blake3::keyed_hash(&self.id_key, &index.to_le_bytes());
        let letters = digest.as_bytes().iter().map(|b| ID_LETTERS[*b as usize % ID_LETTERS.len()]);
        let letters = letters.map(char::from);
        match self.format {
            ToolFormat::MistralArray | ToolFormat::MistralArgs => letters.take(9).collect(),
            _ => "call_".chars().chain(letters.take(24)).collect(),
        }
    }
}

/// Arguments that are written as a JSON string are given out when they are whole.
fn in_arguments(after: After, held: &str) -> State {
    let text = held.starts_with('"').then(String::new);
    State::Arguments { scan: ValueScan::default(), text, after }
}

fn unquoted(text: &str) -> String {
    match text.starts_with('"') {
        true => serde_json::from_str(text).unwrap_or_else(|_| text.to_owned()),
        false => text.to_owned(),
    }
}

/// Bytes at the end of `text` that may be the beginning of `marker`.
fn partial_marker(text: &str, marker: &str) -> usize {
    (1..marker.len()).rev().find(|&n| text.ends_with(&marker[..n])).unwrap_or(0)
}

const HERMES_OPEN: &str = "<tool_call>";
const HERMES_CLOSE: &str = "</tool_call>";
const PYTHON_TAG: &str = "<|python_tag|>";
const MISTRAL_OPEN: &str = "[TOOL_CALLS]";
const ID_LETTERS: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
/// The name of a call and what stands before it; more is no call.
const HEAD_BYTES_MAX: usize = 4_096;
