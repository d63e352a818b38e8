//! Chat templates: messages to a prompt, and the model's text back to content and tool calls.
//!
//! Owns: [`ChatTemplate`] (the Jinja dialect of Hugging Face templates), the limits under which a
//! template from a file runs, and the rule that text of a user never becomes a special token
//! (see [`crate::tokenizer::Guard`]).
//!
//! Refuses: templates above [`TEMPLATE_BYTES_MAX`], a rendering above its budget of steps or
//! bytes, a clock of its own (the caller passes the time in).

mod calendar;
mod json;
mod source;
mod template;
mod tools;

pub use template::{ChatInput, ChatTemplate, Prompt, TemplateError};

pub use calendar::Calendar;
pub use tools::{ToolEvent, ToolFormat, ToolParser};

/// Longest template source, in bytes. The longest published ones have about 30 kB.
pub const TEMPLATE_BYTES_MAX: usize = 256 << 10;

/// Budget of engine instructions for one rendering; a chat of a thousand messages uses some
/// hundred thousand. A template above it is stopped with an error.
pub const TEMPLATE_STEPS_MAX: u64 = 10_000_000;

/// Most bytes that one rendering may write, captured blocks included, and the longest string it
/// may keep in a variable.
pub const TEMPLATE_OUTPUT_BYTES_MAX: usize = 32 << 20;
