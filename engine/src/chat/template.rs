use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use protocol::TokenId;
use serde_json::Value as Json;

use super::{Calendar, TEMPLATE_BYTES_MAX, TEMPLATE_OUTPUT_BYTES_MAX, TEMPLATE_STEPS_MAX};
use super::{json, source};
use crate::tokenizer::{EncodeError, Guard, GuardError, Tokenizer};

/// A compiled chat template. Cheap to clone, shared between threads.
#[derive(Clone)]
pub struct ChatTemplate {
    env: Arc<Environment<'static>>,
    source: Arc<str>,
    is_default: bool,
}

/// What a template is rendered for.
#[derive(Debug, Clone, Copy)]
pub struct ChatInput<'a> {
    /// Messages in OpenAI's form: objects with `role`, `content`, perhaps `tool_calls` and others.
    /// Roles are not text of a user: check them against a closed set before.
    pub messages: &'a [Json],
    /// Tool definitions in OpenAI's form; empty means none.
    pub tools: &'a [Json],
    /// Documents for retrieval templates; empty means none.
    pub documents: &'a [Json],
    /// Whether the prompt ends with the start of an assistant's answer.
    pub add_generation_prompt: bool,
    /// More variables for the template (`enable_thinking`, ...); none replaces those above.
    pub variables: &'a serde_json::Map<String, Json>,
    /// What `strftime_now` reads.
    pub now: Calendar,
}

/// A rendered prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    pub text: String,
    pub tokens: Vec<TokenId>,
}

/// Why a template was refused or a prompt not made. No variant keeps state.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("chat template has {bytes} bytes, the limit is {TEMPLATE_BYTES_MAX}")]
    TooLong { bytes: usize },
    #[error("chat template, line {line}: {reason}")]
    Syntax { line: usize, reason: String },
    /// The template itself refused the messages (`raise_exception`).
    #[error("the model's chat template refuses this: {0}")]
    Refused(String),
    #[error("chat template, line {line}: {reason}")]
    Render { line: usize, reason: String },
    /// The request is larger than what a rendering may use.
    #[error("chat template, line {line}: {limit}")]
    Limit { line: usize, limit: String },
    #[error(transparent)]
    Guard(#[from] GuardError),
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

impl ChatTemplate {
    /// Compiles a template in the dialect of Hugging Face transformers.
    ///
    /// # Errors
    /// Too long, or not a template; the line is that of `source`.
    pub fn new(source: &str) -> Result<Self, TemplateError> {
        if source.len() > TEMPLATE_BYTES_MAX {
            return Err(TemplateError::TooLong { bytes: source.len() });
        }
        let mut env = environment();
        let prepared = source::prepare(source).map_err(|unbounded| TemplateError::Syntax {
            line: unbounded.line,
            reason: unbounded.reason.to_owned(),
        })?;
        env.add_template_owned(NAME, prepared).map_err(|e| {
            let line = e.line().unwrap_or(0);
            TemplateError::Syntax { line, reason: reason(&e) }
        })?;
        Ok(Self { env: Arc::new(env), source: source.into(), is_default: false })
    }

    /// ChatML, for a model that brings no template: `<|im_start|>role\ncontent<|im_end|>\n`. A
    /// model that was not trained on it will answer, but worse than with its own.
    pub fn chatml() -> Self {
        let template = Self::new(CHATML).expect("the built-in template compiles: see the tests");
        Self { is_default: true, ..template }
    }

    /// True for [`ChatTemplate::chatml`].
    pub fn is_default(&self) -> bool {
        self.is_default
    }

    /// The source as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders `input` and encodes it for the model of `tokenizer`. Strings in messages, tools,
    /// documents and variables are plain text and never become special tokens, whatever they look
    /// like; outside of system and assistant messages, neither markers of the template.
    ///
    /// # Errors
    /// The template refuses the messages, fails, or needs more than a rendering may use.
    pub fn render(
        &self,
        tokenizer: &Tokenizer,
        input: &ChatInput<'_>,
    ) -> Result<Prompt, TemplateError> {
        self.render_within(tokenizer, input, TIME_MAX)
    }

    fn render_within(
        &self,
        tokenizer: &Tokenizer,
        input: &ChatInput<'_>,
        time_max: Duration,
    ) -> Result<Prompt, TemplateError> {
        let strings = Strings::of(input);
        let guard = Guard::for_template(tokenizer, &self.source, strings.all())?;
        let budget = Arc::new(Budget::new(strings.bytes, time_max));
        let text = match self.render_guarded(tokenizer, input, &guard, &budget, Calls::AsValues) {
            // most templates want the arguments of calls as values, a few as JSON text
            Err(TemplateError::Render { .. }) if has_calls(input.messages) => {
                self.render_guarded(tokenizer, input, &guard, &budget, Calls::AsText)
            }
            rendered => rendered,
        }?;
        let tokens = tokenizer.encode_template(&text, &guard)?;
        Ok(Prompt { text: guard.reveal(&text), tokens })
    }

    fn render_guarded(
        &self,
        tokenizer: &Tokenizer,
        input: &ChatInput<'_>,
        guard: &Guard,
        budget: &Arc<Budget>,
        calls: Calls,
    ) -> Result<String, TemplateError> {
        let context = context(tokenizer, input, guard, calls);
        let template = self.env.get_template(NAME).map_err(|e| render_error(&e))?;
        let mut out = Capped(Vec::new());
        let mut values: Vec<(String, Value)> = context;
        values.push((BUDGET.to_owned(), Value::from_object(SharedBudget(budget.clone()))));
        let now = input.now;
        values.push((
            "strftime_now".to_owned(),
            Value::from_function(move |format: String| now.strftime(&format)),
        ));
        let context = Value::from_pairs(values);
        template.render_captured_to(context, &mut out).map_err(|e| render_error(&e))?;
        String::from_utf8(out.0).map_err(|_| TemplateError::Render {
            line: 0,
            reason: "output is not UTF-8".to_owned(),
        })
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bytes", &self.source.len()).finish_non_exhaustive()
    }
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the default delimiters are valid"));
    env.set_debug(false);
    env.set_fuel(Some(TEMPLATE_STEPS_MAX));
    env.set_recursion_limit(RECURSION_MAX);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_formatter(format_counted);
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", tojson);
    env.add_filter("replace", replace_filter);
    env.add_filter("join", join_filter);
    env.add_filter("indent", indent_filter);
    env.add_filter("format", format_filter);
    // these make long lists of nothing, and no chat template needs them
    env.remove_filter("batch");
    env.remove_filter("slice");
    // Python iterates over a string, and not over None
    env.add_test("iterable", |value: &Value| {
        value.kind() == ValueKind::String || (!value.is_none() && value.try_iter().is_ok())
    });
    env.add_function("raise_exception", raise_exception);
    env.add_function(source::CHECK, bounded);
    env
}

/// The variables of a rendering, user strings protected.
fn context(
    tokenizer: &Tokenizer,
    input: &ChatInput<'_>,
    guard: &Guard,
    calls: Calls,
) -> Vec<(String, Value)> {
    let list = |items: &[Json]| -> Value {
        let protected = |item| protected(item, &|text| guard.protect(text));
        items.iter().map(protected).collect::<Vec<_>>().into()
    };
    let optional = |items: &[Json]| if items.is_empty() { Value::from(()) } else { list(items) };
    let special = |id: Option<TokenId>| {
        let bytes = id.map(|id| tokenizer.token_bytes(id)).unwrap_or_default();
        Value::from(String::from_utf8_lossy(bytes).into_owned())
    };
    let message = |message: &Json| match message["role"].as_str() {
        Some("assistant" | "system" | "developer") => {
            protected(&adapted(message, calls), &|text| guard.protect_trusted(text))
        }
        _ => protected(&adapted(message, calls), &|text| guard.protect(text)),
    };
    let messages: Vec<Value> = input.messages.iter().map(message).collect();
    let mut values: Vec<(String, Value)> = input
        .variables
        .iter()
        .map(|(name, value)| (name.clone(), protected(value, &|text| guard.protect(text))))
        .collect();
    values.push(("messages".to_owned(), messages.into()));
    values.push(("tools".to_owned(), optional(input.tools)));
    values.push(("documents".to_owned(), optional(input.documents)));
    values.push(("add_generation_prompt".to_owned(), input.add_generation_prompt.into()));
    values.push(("bos_token".to_owned(), special(tokenizer.bos())));
    values.push(("eos_token".to_owned(), special(tokenizer.eos())));
    values
}

/// How a template gets the arguments of calls that a message has as JSON text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Calls {
    AsValues,
    AsText,
}

fn has_calls(messages: &[Json]) -> bool {
    messages.iter().any(|m| m["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty()))
}

/// A message as templates expect it: text parts joined, arguments of calls as values instead of
/// JSON text, reasoning under the name that templates read.
fn adapted(message: &Json, calls: Calls) -> Json {
    let mut message = message.clone();
    let Some(fields) = message.as_object_mut() else { return message };
    if let Some(Json::Array(parts)) = fields.get("content") {
        let texts: Option<Vec<&str>> = parts
            .iter()
            .map(|p| p["text"].as_str().filter(|_| p["type"] == "text" || p["type"].is_null()))
            .collect();
        if let Some(texts) = texts {
            let joined = texts.join("\n");
            fields.insert("content".to_owned(), Json::String(joined));
        }
    }
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| fields.get(*name).filter(|v| !v.is_null()).cloned());
    if let Some(reasoning) = reasoning {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".to_owned(), reasoning);
    }
    for call in fields.get_mut("tool_calls").and_then(Json::as_array_mut).into_iter().flatten() {
        let arguments = call.get_mut("function").and_then(|f| f.get_mut("arguments"));
        if calls == Calls::AsValues
            && let Some(arguments) = arguments
            && let Some(text) = arguments.as_str()
            && let Ok(value @ Json::Object(_)) = serde_json::from_str(text)
        {
            *arguments = value;
        }
    }
    message
}

fn protected(value: &Json, protect: &dyn Fn(&str) -> String) -> Value {
    match value {
        Json::String(text) => Value::from(protect(text)),
        Json::Array(items) => {
            items.iter().map(|item| protected(item, protect)).collect::<Vec<_>>().into()
        }
        Json::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(k, v)| (protect(k), protected(v, protect))))
        }
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(int), _) => Value::from(int),
            (None, Some(int)) => Value::from(int),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
    }
}

/// Every string of an input, for the choice of the guard's mark.
struct Strings<'a> {
    found: Vec<&'a str>,
    bytes: usize,
}

impl<'a> Strings<'a> {
    fn of(input: &ChatInput<'a>) -> Self {
        let mut strings = Self { found: Vec::new(), bytes: 0 };
        for list in [input.messages, input.tools, input.documents] {
            list.iter().for_each(|value| strings.add(value));
        }
        for (key, value) in input.variables {
            strings.push(key);
            strings.add(value);
        }
        strings
    }

    fn add(&mut self, value: &'a Json) {
        match value {
            Json::String(text) => self.push(text),
            Json::Array(items) => items.iter().for_each(|item| self.add(item)),
            Json::Object(fields) => fields.iter().for_each(|(key, value)| {
                self.push(key);
                self.add(value);
            }),
            _ => {}
        }
    }

    fn push(&mut self, text: &'a str) {
        self.bytes += text.len();
        self.found.push(text);
    }

    fn all(&self) -> impl Iterator<Item = &'a str> {
        self.found.iter().copied()
    }
}

/// What one rendering may still use; the engine's fuel counts steps, this counts their size.
#[derive(Debug)]
struct Budget {
    /// Longest string, in bytes: a template has no reason to build much more than it was given.
    string_bytes_max: usize,
    /// Bytes written into captures and output.
    written: AtomicU64,
    /// Values looked at by the checks, long strings as several.
    looked_at: AtomicU64,
    deadline: Instant,
}

#[derive(Debug)]
struct SharedBudget(Arc<Budget>);

impl minijinja::value::Object for SharedBudget {}

impl Budget {
    fn new(input_bytes: usize, time_max: Duration) -> Self {
        let string_bytes_max = (STRING_BYTES_MIN + 4 * input_bytes).min(TEMPLATE_OUTPUT_BYTES_MAX);
        Self {
            string_bytes_max,
            written: AtomicU64::new(0),
            looked_at: AtomicU64::new(0),
            deadline: Instant::now() + time_max,
        }
    }

    /// Refuses a value whose text would be too long.
    fn check(&self, value: &Value) -> Result<(), Error> {
        if Instant::now() > self.deadline {
            return Err(limit("takes too long"));
        }
        let mut text_bytes = 0;
        self.measure(value, &mut text_bytes, 0)
    }

    fn measure(&self, value: &Value, text_bytes: &mut usize, depth: usize) -> Result<(), Error> {
        let len = value.as_str().map_or(0, str::len);
        *text_bytes += len + 2;
        let looked_at = 1 + len as u64 / 256;
        if self.looked_at.fetch_add(looked_at, Ordering::Relaxed) > LOOKED_AT_MAX {
            return Err(limit("handles too many values"));
        }
        if *text_bytes > self.string_bytes_max || depth > DEPTH_MAX {
            return Err(limit("builds a value that is too large or too deep"));
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                for item in value.try_iter()? {
                    self.measure(&item, text_bytes, depth + 1)?;
                }
            }
            ValueKind::Map if value.downcast_object_ref::<SharedBudget>().is_none() => {
                for key in value.try_iter()? {
                    self.measure(&key, text_bytes, depth + 1)?;
                    if let Ok(item) = value.get_item(&key) {
                        self.measure(&item, text_bytes, depth + 1)?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn write(&self, bytes: usize) -> Result<(), Error> {
        let before = self.written.fetch_add(bytes as u64, Ordering::Relaxed);
        if before + bytes as u64 > TEMPLATE_OUTPUT_BYTES_MAX as u64 {
            return Err(limit("writes too much"));
        }
        Ok(())
    }
}

fn with_budget<R>(
    state: &State<'_, '_>,
    act: impl FnOnce(&Budget) -> Result<R, Error>,
) -> Result<R, Error> {
    let value = state.lookup(BUDGET).ok_or_else(|| limit("hides its budget"))?;
    let budget =
        value.downcast_object_ref::<SharedBudget>().ok_or_else(|| limit("hides its budget"))?;
    act(&budget.0)
}

fn format_counted(
    out: &mut Output<'_>,
    state: &mut State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    with_budget(state, |budget| {
        budget.check(value)?;
        budget.write(value.as_str().map_or(0, str::len))
    })?;
    if value.kind() == ValueKind::Number && !value.is_integer() {
        let text = json::python_float(f64::try_from(value.clone()).unwrap_or(f64::NAN));
        return out.write_str(&text).map_err(Error::from);
    }
    minijinja::escape_formatter(out, state, value)
}

fn bounded(state: &mut State<'_, '_>, values: Rest<Value>) -> Result<bool, Error> {
    with_budget(state, |budget| values.iter().try_for_each(|value| budget.check(value)))?;
    Ok(false)
}

fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match (name, value.as_str(), args) {
        ("replace", Some(text), [from, to, ..]) => charge_replace(state, text, from, to)?,
        ("join", Some(between), [items]) => charge_join(state, items, between.len())?,
        ("format", Some(text), args) => charge_format(state, text, args)?,
        _ => {}
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn tojson(state: &mut State<'_, '_>, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let text = json::tojson(value, options)?;
    charge(state, text.as_str().map_or(0, str::len))?;
    Ok(text)
}

fn replace_filter(
    state: &mut State<'_, '_>,
    text: String,
    from: Value,
    to: Value,
) -> Result<String, Error> {
    charge_replace(state, &text, &from, &to)?;
    Ok(text.replace(&from.to_string(), &to.to_string()))
}

fn join_filter(
    state: &mut State<'_, '_>,
    items: Value,
    between: Option<Value>,
    attribute: Option<String>,
    options: Kwargs,
) -> Result<Value, Error> {
    let length = between.as_ref().and_then(Value::as_str).map_or(0, str::len);
    charge_join(state, &items, length)?;
    let between = match between {
        Some(between) if between.as_str().is_some() => between.as_str().map(str::to_owned),
        _ => None,
    };
    let attribute = match attribute {
        Some(attribute) => Some(attribute),
        None => options.get::<Option<String>>("attribute")?,
    };
    options.assert_all_used()?;
    let mut text = String::new();
    for (i, item) in items.try_iter()?.enumerate() {
        if let (true, Some(between)) = (i > 0, &between) {
            text.push_str(between);
        }
        let item = match &attribute {
            Some(name) => item.get_attr(name)?,
            None => item,
        };
        match item.as_str() {
            Some(item) => text.push_str(item),
            None => text.push_str(&item.to_string()),
        }
    }
    Ok(Value::from(text))
}

fn indent_filter(
    state: &mut State<'_, '_>,
    text: String,
    width: Option<usize>,
    first: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let width = width.or(options.get::<Option<usize>>("width")?).unwrap_or(4);
    let first = first.or(options.get::<Option<bool>>("first")?).unwrap_or(false);
    let blank = options.get::<Option<bool>>("blank")?.unwrap_or(false);
    options.assert_all_used()?;
    let lines = 1 + text.matches('\n').count();
    charge(state, lines.saturating_mul(width).saturating_add(text.len()))?;
    let space = " ".repeat(width);
    let indented = text.split('\n').enumerate().map(|(i, line)| {
        let wanted = if i == 0 { first } else { blank || !line.is_empty() };
        if wanted { format!("{space}{line}") } else { line.to_owned() }
    });
    Ok(indented.collect::<Vec<_>>().join("\n"))
}

fn format_filter(
    state: &mut State<'_, '_>,
    text: String,
    args: Rest<Value>,
) -> Result<String, Error> {
    charge_format(state, &text, &args)?;
    minijinja::formatting::format(minijinja::formatting::FormatStyle::Printf, &text, &args)
}

/// Refuses text that would be too long, and counts it.
fn charge(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    with_budget(state, |budget| {
        if bytes > budget.string_bytes_max {
            return Err(limit("builds a value that is too large or too deep"));
        }
        budget.write(bytes)
    })
}

fn charge_replace(
    state: &State<'_, '_>,
    text: &str,
    from: &Value,
    to: &Value,
) -> Result<(), Error> {
    let (Some(from), Some(to)) = (from.as_str(), to.as_str()) else {
        return with_budget(state, |budget| budget.check(from).and_then(|()| budget.check(to)));
    };
    let count = text.matches(from).count();
    charge(state, count.saturating_mul(to.len()).saturating_add(text.len()))
}

fn charge_join(state: &State<'_, '_>, items: &Value, between: usize) -> Result<(), Error> {
    let (mut bytes, mut count) = (0, 0usize);
    with_budget(state, |budget| budget.measure(items, &mut bytes, 0))?;
    if items.as_str().is_none() && items.len().is_none() {
        // a lazy list: count it, which its measure did not
        count = items.try_iter()?.take(STRING_BYTES_MIN).count();
    }
    let count = count.max(items.len().unwrap_or(0));
    charge(state, count.saturating_mul(between).saturating_add(bytes))
}

/// Widths and precisions make text out of nothing: each number in the format counts as text, and
/// each field as the longest argument.
fn charge_format(state: &State<'_, '_>, text: &str, args: &[Value]) -> Result<(), Error> {
    let mut longest = 0;
    for arg in args {
        let mut bytes = 0;
        with_budget(state, |budget| budget.measure(arg, &mut bytes, 0))?;
        longest = longest.max(bytes);
        // `*` takes a width from the arguments
        longest = longest.max(arg.as_usize().filter(|_| text.contains('*')).unwrap_or(0));
    }
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty());
    let widths = numbers
        .map(|n| n.parse::<usize>().unwrap_or(usize::MAX))
        .fold(0usize, usize::saturating_add);
    let fields = text.matches(['%', '{']).count();
    let bytes = fields.saturating_mul(longest.saturating_add(32));
    charge(state, bytes.saturating_add(widths).saturating_add(text.len()))
}

fn raise_exception(message: Option<String>) -> Result<Value, Error> {
    let message = message.unwrap_or_default();
    Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
}

fn limit(what: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, what).with_source(OverLimit)
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

#[derive(Debug, thiserror::Error)]
#[error("over the limit of a rendering")]
struct OverLimit;

fn render_error(error: &Error) -> TemplateError {
    let line = error.line().unwrap_or(0);
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(raised) = cause.downcast_ref::<Raised>() {
            return TemplateError::Refused(raised.0.clone());
        }
        if cause.is::<OverLimit>() || cause.is::<Overflow>() {
            return TemplateError::Limit { line, limit: reason(error) };
        }
        source = cause.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        let limit = format!("needs more than {TEMPLATE_STEPS_MAX} steps");
        return TemplateError::Limit { line, limit };
    }
    TemplateError::Render { line, reason: reason(error) }
}

fn reason(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// Output that refuses more than [`TEMPLATE_OUTPUT_BYTES_MAX`].
struct Capped(Vec<u8>);

#[derive(Debug, thiserror::Error)]
#[error("writes too much")]
struct Overflow;

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > TEMPLATE_OUTPUT_BYTES_MAX {
            return Err(io::Error::other(Overflow));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const NAME: &str = "chat_template";
const BUDGET: &str = "__budget";
/// Nesting of macros, loops and calls; each level takes native stack.
const RECURSION_MAX: usize = 100;
/// Nesting of values that are checked.
const DEPTH_MAX: usize = 128;
/// What a template may build for an empty chat; the longest public one writes 8 kB.
const STRING_BYTES_MIN: usize = 128 << 10;
const LOOKED_AT_MAX: u64 = 20_000_000;
/// A rendering is stopped after this long; an ordinary one needs about a millisecond.
const TIME_MAX: Duration = Duration::from_secs(5);

/// ChatML, written for this project, with tools as [`super::ToolFormat::Hermes`] reads them.
const CHATML: &str = r#"{%- if tools %}
{{- "<|im_start|>system\n" }}
{%- if messages and messages[0].role == "system" %}{{ messages[0].content }}{{ "\n\n" }}{% endif %}
{{- "You can call these functions:\n<tools>\n" }}
{%- for tool in tools %}{{ tool | tojson }}{{ "\n" }}{% endfor %}
{{- "</tools>\nTo call one, answer with:\n<tool_call>\n" }}
{{- '{"name": <its name>, "arguments": <a JSON object>}' }}{{ "\n</tool_call><|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}
{{- "<|im_start|>user\n<tool_response>\n" }}{{ message.content }}{{ "\n</tool_response><|im_end|>\n" }}
{%- elif not (tools and loop.first and message.role == "system") %}
{{- "<|im_start|>" }}{{ message.role }}{{ "\n" }}{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
{%- if message.content or not loop.first %}{{ "\n" }}{% endif %}
{{- '<tool_call>\n{"name": ' }}{{ call.function.name | tojson }}{{ ', "arguments": ' }}
{%- if call.function.arguments is string %}{{ call.function.arguments }}
{%- else %}{{ call.function.arguments | tojson }}{% endif %}
{{- "}\n</tool_call>" }}
{%- endfor %}
{{- "<|im_end|>\n" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"#;

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
