//! Why a model was refused.

use std::path::PathBuf;

/// A model that cannot be used. Each sentence names the file, what in it, and what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The operating system did not give the file.
    #[error("{}: cannot be read: {reason}", .file.display())]
    Unreadable { file: PathBuf, reason: String },
    /// The file as a whole is not what its name says.
    #[error("{}: {reason}", .file.display())]
    File { file: PathBuf, reason: String },
    /// A key of the model's description.
    #[error("{}: `{key}` is {value}; expected {expected}", .file.display())]
    Config { file: PathBuf, key: String, value: String, expected: String },
    /// A key that must be there.
    #[error("{}: `{key}` is missing; expected {expected}", .file.display())]
    MissingKey { file: PathBuf, key: String, expected: String },
    /// A family of models that this engine does not compute.
    #[error("{}: architecture `{found}` is not supported; supported are {supported}", .file.display())]
    Architecture { file: PathBuf, found: String, supported: String },
    /// A tensor that must be there.
    #[error("{}: tensor `{tensor}` is missing", .file.display())]
    MissingTensor { file: PathBuf, tensor: String },
    /// A tensor that cannot be used as it is.
    #[error("{}: tensor `{tensor}`: {reason}", .file.display())]
    Tensor { file: PathBuf, tensor: String, reason: String },
}
