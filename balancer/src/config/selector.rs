//! Label selectors in the form that `kubectl -l` takes.
//!
//! It reads them as the API server does (`k8s.io/apimachinery/pkg/labels`), with two exceptions.
//! The operators `<` and `>` are not supported. A selector without requirements, which would select
//! everything, is refused.

use std::{collections::BTreeSet, fmt};

use kube::core::{Expression, Selector};

use super::yaml::shown;

/// The longest name part of a label's key, and the longest value.
const MAX_WORD: usize = 63;
/// The longest prefix of a label's key.
const MAX_PREFIX: usize = 253;

/// What is wrong with a label selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectorError(String);

impl fmt::Display for SelectorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SelectorError {}

type Result<T> = std::result::Result<T, SelectorError>;

fn wrong<T>(problem: impl Into<String>) -> Result<T> {
    Err(SelectorError(problem.into()))
}

/// Parses a label selector: requirements with commas between them, each `key`, `!key`, `key=value`
/// (or `==`), `key!=value`, `key in (a,b)` or `key notin (a,b)`.
///
/// # Errors
/// When it has no requirement, or one that is none, or whose key or value no label can have.
pub fn selector(text: &str) -> Result<Selector> {
    let mut words = Words { rest: text };
    if words.peek().is_none() {
        return wrong("it selects everything");
    }
    let mut requirements = Vec::new();
    loop {
        requirements.push(requirement(&mut words)?);
        match words.next() {
            None => return Ok(requirements.into_iter().collect()),
            Some(",") => {}
            Some(word) => return wrong(format!("`{}` where a comma should be", shown(word))),
        }
    }
}

fn requirement(words: &mut Words) -> Result<Expression> {
    let first = words.next();
    if first == Some("!") {
        return Ok(Expression::DoesNotExist(key(words.next())?));
    }
    let key = key(first)?;
    Ok(match words.peek() {
        None | Some(",") => Expression::Exists(key),
        Some("=" | "==") => Expression::Equal(key, words.operand()?),
        Some("!=") => Expression::NotEqual(key, words.operand()?),
        Some("in") => Expression::In(key, words.set()?),
        Some("notin") => Expression::NotIn(key, words.set()?),
        Some(sign @ ("<" | ">")) => return wrong(format!("`{sign}` is not supported")),
        Some(word) => {
            return wrong(format!(
                "`{}` after the key `{}`, where =, !=, in, notin or a comma should be",
                shown(word),
                shown(&key)
            ));
        }
    })
}

/// A selector from left to right, in words and signs.
struct Words<'a> {
    rest: &'a str,
}

impl<'a> Words<'a> {
    fn peek(&self) -> Option<&'a str> {
        // Other white space is none to the API server either.
        let rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        let sign = ["==", "!=", "=", "!", "(", ")", ",", "<", ">"]
            .into_iter()
            .find(|sign| rest.starts_with(sign));
        let end = sign.map_or_else(
            || {
                rest.find([' ', '\t', '\r', '\n', '=', '!', '(', ')', ',', '<', '>'])
                    .unwrap_or(rest.len())
            },
            str::len,
        );
        Some(&rest[..end]).filter(|word| !word.is_empty())
    }

    fn next(&mut self) -> Option<&'a str> {
        let word = self.peek()?;
        let start = self.rest.find(word).unwrap_or_default();
        self.rest = &self.rest[start + word.len()..];
        Some(word)
    }

    /// The value after `=` or `!=`: none is the empty one.
    fn operand(&mut self) -> Result<String> {
        self.next();
        match self.peek() {
            None | Some(",") => Ok(String::new()),
            Some(_) => value(self.next().unwrap_or_default()),
        }
    }

    /// The values after `in` or `notin`; none between two commas is the empty one.
    fn set(&mut self) -> Result<BTreeSet<String>> {
        let operator = self.next().unwrap_or_default();
        if self.next() != Some("(") {
            return wrong(format!(
                "`{operator}` without a list of values in parentheses"
            ));
        }
        if self.peek() == Some(")") {
            return wrong(format!("`{operator} ()` has no values"));
        }
        let mut values = BTreeSet::new();
        let mut last = "";
        loop {
            match self.next() {
                None => return wrong("a parenthesis that is not closed"),
                Some(sign @ ("," | ")")) => {
                    values.insert(value(last)?);
                    if sign == ")" {
                        return Ok(values);
                    }
                    last = "";
                }
                Some(word) if last.is_empty() => last = word,
                Some(word) => return wrong(format!("`{}` where a comma should be", shown(word))),
            }
        }
    }
}

fn key(word: Option<&str>) -> Result<String> {
    let Some(word) = word else {
        return wrong("it ends where a key should be");
    };
    let (prefix, name) = match word.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, word),
    };
    if prefix.is_none_or(is_subdomain) && is_word(name) {
        return Ok(word.to_owned());
    }
    wrong(format!("no label has the key `{}`", shown(word)))
}

fn value(word: &str) -> Result<String> {
    if word.is_empty() || is_word(word) {
        return Ok(word.to_owned());
    }
    wrong(format!("no label has the value `{}`", shown(word)))
}

/// Letters and digits, and between them also `-`, `_` and `.`; not too many.
fn is_word(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    text.len() <= MAX_WORD
        && text.bytes().all(inner)
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
}

/// Whether `text` is a DNS subdomain (RFC 1123) as Kubernetes understands it: of small letters.
fn is_subdomain(text: &str) -> bool {
    let is_part = |part: &str| {
        let inner = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-');
        !part.is_empty()
            && part.chars().all(inner)
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    text.len() <= MAX_PREFIX && text.split('.').all(is_part)
}
