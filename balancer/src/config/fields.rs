//! Reading the values of a mapping, and what to say where one is missing, unknown or of the wrong kind.

use super::{
    ConfigError,
    error::at_line,
    yaml::{Entry, Node, Value, shown},
};

pub(super) type Result<T> = std::result::Result<T, ConfigError>;

/// The keys of one mapping, all of them known ones.
pub(super) struct Fields<'a> {
    what: &'static str,
    line: usize,
    pub(super) entries: &'a [Entry],
}

impl<'a> Fields<'a> {
    /// The keys of `node`, which is `what` in messages and may have the `known` ones.
    pub(super) fn of(node: &'a Node, what: &'static str, known: &[&str]) -> Result<Self> {
        let Value::Map(entries) = &*node.value else {
            return Err(at_line(
                node.line,
                format!(
                    "{what} must be `key: value` settings, this is {}",
                    node.value.kind()
                ),
                format!("the keys are {}", known.join(", ")),
            ));
        };
        for entry in entries {
            if !known.contains(&entry.key.as_str()) {
                return Err(at_line(
                    entry.line,
                    format!("unknown key `{}` in {what}", shown(&entry.key)),
                    unknown_key_advice(&entry.key, known),
                ));
            }
        }
        Ok(Self {
            what,
            line: node.line,
            entries,
        })
    }

    /// The value of a key, if it is there.
    pub(super) fn get(&self, key: &str) -> Option<&'a Node> {
        self.entries
            .iter()
            .find(|entry| entry.key == key)
            .map(|entry| &entry.node)
    }

    /// The value of a key that must be there.
    pub(super) fn required(&self, key: &str) -> Result<&'a Node> {
        self.get(key).ok_or_else(|| {
            at_line(
                self.line,
                format!("`{key}` is missing in {}", self.what),
                format!("add `{key}: …`"),
            )
        })
    }

    /// What `read` makes of the value of a key, if it is there.
    pub(super) fn optional<T>(
        &self,
        key: &str,
        read: impl FnOnce(&Node) -> Result<T>,
    ) -> Result<Option<T>> {
        self.get(key).map(read).transpose()
    }
}

fn unknown_key_advice(key: &str, known: &[&str]) -> String {
    if key == "<<" {
        return "YAML merge keys are not supported: write the settings out".to_owned();
    }
    let near = known
        .iter()
        .filter(|candidate| alike(key, candidate))
        .min_by_key(|near| distance(key, near));
    let question = near
        .map(|near| format!("did you mean `{near}`? "))
        .unwrap_or_default();
    format!("{question}the keys are {}", known.join(", "))
}

/// Whether `key` is likely a slip for `candidate`: another case or another separator, or few letters changed (two make a transposition).
fn alike(key: &str, candidate: &str) -> bool {
    let key = key.to_lowercase().replace('-', "_");
    // A longer word can't be a slip for any key, and the distance costs the product of both lengths.
    key.len() <= 2 * candidate.len() && distance(&key, candidate) <= candidate.len().div_ceil(3)
}

/// How many letters must be inserted, removed or replaced to make `a` into `b` (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// The items of a list.
pub(super) fn list<'a>(node: &'a Node, what: &str, example: &str) -> Result<&'a [Node]> {
    match &*node.value {
        Value::List(nodes) => Ok(nodes),
        Value::Null => Err(at_line(
            node.line,
            format!("{what} has no value"),
            format!("write a list, for example {example}"),
        )),
        other => Err(at_line(
            node.line,
            format!("{what} must be a list, this is {}", other.kind()),
            format!("write {example}"),
        )),
    }
}

/// The text of a single value.
pub(super) fn scalar<'a>(node: &'a Node, what: &str, example: &str) -> Result<&'a str> {
    match &*node.value {
        Value::Scalar(text) => Ok(text),
        Value::Null => Err(at_line(
            node.line,
            format!("{what} is missing here"),
            format!("write a value, for example {example}"),
        )),
        other => Err(at_line(
            node.line,
            format!("{what} must be a single value, this is {}", other.kind()),
            format!("write for example {example}"),
        )),
    }
}

/// A whole number from `least` to `most`.
pub(super) fn number(node: &Node, key: &str, least: u32, most: u32, advice: &str) -> Result<u32> {
    let text = scalar(node, key, &least.to_string())?;
    decimal(text)
        .and_then(|number| u32::try_from(number).ok())
        .filter(|number| (least..=most).contains(number))
        .ok_or_else(|| {
            at_line(
                node.line,
                format!("{key} `{}` is not possible", shown(text)),
                format!("write a whole number from {least} to {most}; {advice}"),
            )
        })
}

/// A whole number in plain decimal digits: no sign, no separators, no other base, since YAML dialects disagree on what those mean.
pub(super) fn decimal(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok() } else { None }
}
