//! A template's source made ready for the engine, which knows no `{% generation %}` and puts no
//! limit on the strings that a template builds.
//!
//! `generation` marks assistant text for training; here it is only a scope. What a template keeps
//! (`set`, `with`, loop targets, macro and call arguments) is the only way to make text grow
//! without bound in few steps, so each such tag is followed by a check of the names it binds. What
//! one expression can make of bounded values is limited here by its length, by how often it joins,
//! and by what it may repeat. The scan cuts tags exactly where the engine's lexer does.

/// The function that the added checks call.
pub(super) const CHECK: &str = "__bounded";

/// What is wrong with a source, and where.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unbounded {
    pub(super) line: usize,
    pub(super) reason: &'static str,
}

/// `source` with these changes; lines stay where they were.
pub(super) fn prepare(source: &str) -> Result<String, Unbounded> {
    let mut out = String::with_capacity(source.len() + source.len() / 4);
    let mut rest = source;
    let mut repeated = 1;
    while let Some(open) = rest.find('{') {
        let (text, from) = rest.split_at(open);
        out.push_str(text);
        let at = source.len() - from.len();
        let unbounded = |reason| Unbounded { line: line_of(source, at), reason };
        let (whole, tag) = match from.as_bytes().get(1) {
            Some(b'#') => (from[2..].find("#}").map_or(from.len(), |end| end + 4), None),
            Some(b'{') => (expression(from, "}}", &mut repeated).map_err(unbounded)?, None),
            Some(b'%') => match raw_length(from) {
                Some(raw) => (raw, None),
                None => {
                    let end = expression(from, "%}", &mut repeated).map_err(unbounded)?;
                    (end, Tag::parse(&from[..end]))
                }
            },
            _ => (1, None),
        };
        match tag {
            Some(tag) => tag.write(&mut out),
            None => out.push_str(&from[..whole]),
        }
        rest = &from[whole..];
    }
    out.push_str(rest);
    Ok(out)
}

fn line_of(source: &str, at: usize) -> usize {
    1 + source.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count()
}

/// Length of a tag from its opening to behind `end`, which does not count inside strings and
/// brackets. `repeated` is the product of all repetitions of the template.
fn expression(tag: &str, end: &str, repeated: &mut u64) -> Result<usize, &'static str> {
    let bytes = tag.as_bytes();
    let (mut at, mut balance, mut joins) = (2, 0isize, 0);
    let mut before = Atom::Other;
    // `Some(true)`: a `*` came before and is already known to be harmless
    let mut times = None;
    while at < bytes.len() {
        if at > EXPRESSION_BYTES_MAX {
            return Err("an expression is too long");
        }
        let byte = bytes[at];
        if byte.is_ascii_whitespace() {
            at += 1;
            continue;
        }
        if balance == 0 && bytes[at..].starts_with(end.as_bytes()) {
            check_times(times, Atom::Other, repeated)?;
            return Ok(at + end.len());
        }
        let (atom, len) = atom(&tag[at..]);
        check_times(times.take(), atom, repeated)?;
        match byte {
            b'(' | b'[' | b'{' => balance += 1,
            b')' | b']' | b'}' => balance -= 1,
            b'~' | b'+' => joins += 1,
            b'*' if len == 1 => times = Some(check_left(before, repeated)?),
            _ => {}
        }
        if joins > JOINS_MAX {
            return Err("an expression joins too many values");
        }
        before = atom;
        at += len;
    }
    Ok(bytes.len())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Atom {
    Text,
    Number(u64),
    Other,
}

/// The token at the front and its length; only what the checks need to know is told apart.
fn atom(text: &str) -> (Atom, usize) {
    let bytes = text.as_bytes();
    match bytes[0] {
        quote @ (b'"' | b'\'') => {
            let mut at = 1;
            while at < bytes.len() && bytes[at] != quote {
                at += if bytes[at] == b'\\' { 2 } else { 1 };
            }
            (Atom::Text, (at + 1).min(bytes.len()))
        }
        b'0'..=b'9' => {
            let len = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let len = len.unwrap_or(text.len());
            (Atom::Number(text[..len].parse().unwrap_or(u64::MAX)), len)
        }
        b'*' if bytes.get(1) == Some(&b'*') => (Atom::Other, 2),
        _ => {
            let len = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
            (Atom::Other, len.max(text.chars().next().map_or(1, char::len_utf8)))
        }
    }
}

/// A list repeated is as long as the product says, and the engine builds it without a step for
/// each item. Repeated text has a limit in the engine.
fn check_left(before: Atom, repeated: &mut u64) -> Result<bool, &'static str> {
    match before {
        Atom::Text => Ok(true),
        Atom::Number(n) if n <= REPEAT_MAX => multiply(n, repeated).map(|()| true),
        _ => Ok(false),
    }
}

fn check_times(times: Option<bool>, after: Atom, repeated: &mut u64) -> Result<(), &'static str> {
    match (times, after) {
        (None | Some(true), _) | (Some(false), Atom::Text) => Ok(()),
        (Some(false), Atom::Number(n)) if n <= REPEAT_MAX => multiply(n, repeated),
        (Some(false), _) => Err("only text, or values and a small number, can be multiplied"),
    }
}

fn multiply(n: u64, repeated: &mut u64) -> Result<(), &'static str> {
    *repeated = repeated.saturating_mul(n.max(1));
    match *repeated > REPEAT_PRODUCT_MAX {
        true => Err("values are multiplied too often"),
        false => Ok(()),
    }
}

/// Length of a whole `{% raw %}...{% endraw %}`.
fn raw_length(from: &str) -> Option<usize> {
    let mut at = 2 + usize::from(matches!(from.as_bytes().get(2), Some(b'-' | b'+')));
    at += bare_tag(&from[at..], "raw")?;
    while let Some(open) = from[at..].find("{%") {
        at += open + 2;
        let dash = usize::from(matches!(from.as_bytes().get(at), Some(b'-' | b'+')));
        if let Some(end) = bare_tag(&from[at + dash..], "endraw") {
            return Some(at + dash + end);
        }
    }
    Some(from.len())
}

/// Length of ` name %}` at the front.
fn bare_tag(text: &str, name: &str) -> Option<usize> {
    let space = |t: &str| t.len() - t.trim_ascii_start().len();
    let mut at = space(text);
    at += text[at..].starts_with(name).then_some(name.len())?;
    at += space(&text[at..]);
    at += usize::from(text[at..].starts_with(['-', '+']));
    text[at..].starts_with("%}").then_some(at + 2)
}

struct Tag<'a> {
    /// `{%` with its `-` or `+`.
    open: &'a str,
    name: &'a str,
    body: &'a str,
    /// `%}` with its `-` or `+`.
    close: &'a str,
    whole: &'a str,
}

impl<'a> Tag<'a> {
    fn parse(whole: &'a str) -> Option<Self> {
        let inner = whole.strip_prefix("{%")?.strip_suffix("%}")?;
        let body = inner.strip_prefix(['-', '+']).unwrap_or(inner);
        let open = &whole[..2 + inner.len() - body.len()];
        let trimmed = body.strip_suffix(['-', '+']).unwrap_or(body);
        let close = &whole[whole.len() - 2 - (body.len() - trimmed.len())..];
        let trimmed = trimmed.trim();
        let name_end = trimmed.find(|c: char| !c.is_alphanumeric() && c != '_');
        let (name, body) = trimmed.split_at(name_end.unwrap_or(trimmed.len()));
        Some(Self { open, name, body, close, whole })
    }

    fn write(&self, out: &mut String) {
        match self.name {
            "generation" => self.renamed(out, "with"),
            "endgeneration" => self.renamed(out, "endwith"),
            "set" | "with" | "for" | "macro" | "call" => {
                out.push_str(self.whole);
                let names = self.bound_names();
                if !names.is_empty() {
                    // the same whitespace control on both sides as the tag's end has
                    let dash = if self.close.starts_with('-') { "-" } else { "" };
                    let names = names.join(", ");
                    out.push_str(&format!("{{%{dash} if {CHECK}({names}) %}}"));
                    out.push_str("{% endif ");
                    out.push_str(self.close);
                }
            }
            _ => out.push_str(self.whole),
        }
    }

    fn renamed(&self, out: &mut String, name: &str) {
        out.push_str(self.open);
        out.push(' ');
        out.push_str(name);
        out.push(' ');
        // a tag over several lines keeps them, for line numbers in errors
        out.extend(self.whole.chars().filter(|&c| c == '\n'));
        out.push_str(self.close);
    }

    /// Names that hold a value once this tag was read.
    fn bound_names(&self) -> Vec<&'a str> {
        match self.name {
            "for" => names(self.body.split(" in ").next().unwrap_or_default()),
            // a block capture has no value yet, and the formatter counts what goes into it
            "set" => names(assigned(self.body).unwrap_or_default()),
            "with" => assignments(self.body).into_iter().flat_map(names).collect(),
            "macro" => {
                let Some((_, parameters)) = self.body.split_once('(') else { return Vec::new() };
                parameter_names(parameters)
            }
            "call" => match self.body.trim_start().strip_prefix('(') {
                Some(parameters) => parameter_names(parameters),
                None => Vec::new(),
            },
            _ => Vec::new(),
        }
    }
}

/// Identifiers, dotted ones whole, at the top level of a target like `a, (ns.b)`.
fn names(target: &str) -> Vec<&str> {
    target
        .split(|c: char| !c.is_alphanumeric() && c != '_' && c != '.')
        .filter(|n| n.starts_with(|c: char| c.is_alphabetic() || c == '_'))
        .collect()
}

/// The text left of the first top-level `=`.
fn assigned(body: &str) -> Option<&str> {
    let mut first = None;
    top_level(body, |at, byte, _| {
        if byte == b'=' {
            first.get_or_insert(at);
        }
    });
    first.map(|at| &body[..at])
}

/// The texts left of each top-level `=` of `a = 1, b = f(x=2)`, from the comma before.
fn assignments(body: &str) -> Vec<&str> {
    let mut found = Vec::new();
    top_level(body, |at, byte, from| {
        if byte == b'=' {
            found.push(&body[from..at]);
        }
    });
    found
}

fn parameter_names(parameters: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut last = usize::MAX;
    top_level(parameters, |_, _, from| {
        if from != last {
            last = from;
            let end =
                parameters[from..].find([',', '=', ')']).map_or(parameters.len(), |end| from + end);
            found.extend(names(&parameters[from..end]));
        }
    });
    found
}

/// Calls `each` with (position, byte, start of this comma-separated part) for each `=` that
/// assigns, each comma and the closing bracket, all outside strings and brackets.
fn top_level(text: &str, mut each: impl FnMut(usize, u8, usize)) {
    let bytes = text.as_bytes();
    let (mut depth, mut from, mut quote, mut at) = (0usize, 0, None, 0);
    while at < bytes.len() {
        let byte = bytes[at];
        match (quote, byte) {
            (Some(_), b'\\') => at += 1,
            (Some(q), b) if q == b => quote = None,
            (Some(_), _) => {}
            (None, b'"' | b'\'') => quote = Some(byte),
            (None, b'(' | b'[' | b'{') => depth += 1,
            (None, b')' | b']' | b'}') => {
                if depth == 0 {
                    each(at, byte, from);
                    return;
                }
                depth -= 1;
            }
            (None, b',') if depth == 0 => {
                each(at, byte, from);
                from = at + 1;
            }
            (None, b'=') if depth == 0 => {
                let before = at.checked_sub(1).map(|b| bytes[b]);
                let compares = matches!(before, Some(b'=' | b'!' | b'<' | b'>'))
                    || bytes.get(at + 1) == Some(&b'=');
                if !compares {
                    each(at, byte, from);
                }
            }
            _ => {}
        }
        at += 1;
    }
}

/// Bytes of one tag. Public templates have tags of up to six thousand, nearly all of it text.
const EXPRESSION_BYTES_MAX: usize = 16 << 10;
/// `~` and `+` in one tag; public templates have up to eleven.
const JOINS_MAX: usize = 64;
const REPEAT_MAX: u64 = 1_000;
/// Of all small numbers that a template multiplies with.
const REPEAT_PRODUCT_MAX: u64 = 1_000_000;
