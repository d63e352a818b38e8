//! A template's source made ready for the engine, which knows no `{% generation %}` and puts no
//! limit on the strings that a template keeps.
//!
//! `generation` marks assistant text for training; here it is only a scope. What a template keeps
//! (`set`, `with`, loop targets, macro and call arguments) is the only way to make text grow
//! without bound in few steps, so each such tag is followed by a check of the names it binds.

/// The function that the added checks call.
pub(super) const CHECK: &str = "__bounded";

/// `source` with these changes; lines stay where they were.
pub(super) fn prepare(source: &str) -> String {
    let mut out = String::with_capacity(source.len() + source.len() / 4);
    let mut rest = source;
    while let Some(open) = rest.find('{') {
        let (text, from) = rest.split_at(open);
        out.push_str(text);
        let (whole, tag) = match from.as_bytes().get(1) {
            Some(b'#') => (from.find("#}").map_or(from.len(), |end| end + 2), None),
            Some(b'{') => (closing(from, "}}"), None),
            Some(b'%') => {
                let end = closing(from, "%}");
                let tag = Tag::parse(&from[..end]);
                match &tag {
                    Some(tag) if tag.name == "raw" => (end + raw_length(&from[end..]), None),
                    _ => (end, tag),
                }
            }
            _ => (1, None),
        };
        match tag {
            Some(tag) => tag.write(&mut out),
            None => out.push_str(&from[..whole]),
        }
        rest = &from[whole..];
    }
    out.push_str(rest);
    out
}

/// Length of a tag from its opening to behind `end`, which does not count inside strings.
fn closing(tag: &str, end: &str) -> usize {
    let bytes = tag.as_bytes();
    let mut quote = None;
    let mut at = 2;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(q), b) if q == b => quote = None,
            (Some(_), _) => {}
            (None, b @ (b'"' | b'\'')) => quote = Some(b),
            (None, _) if bytes[at..].starts_with(end.as_bytes()) => return at + end.len(),
            (None, _) => {}
        }
        at += 1;
    }
    bytes.len()
}

/// Length up to and with the `{% endraw %}` tag.
fn raw_length(after: &str) -> usize {
    let mut at = 0;
    while let Some(open) = after[at..].find("{%") {
        let start = at + open;
        let end = start + closing(&after[start..], "%}");
        if Tag::parse(&after[start..end]).is_some_and(|t| t.name == "endraw") {
            return end;
        }
        at = start + 2;
    }
    after.len()
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
