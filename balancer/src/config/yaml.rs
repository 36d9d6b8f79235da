//! YAML with the line of every value.
//!
//! A tree of located values, built from the events of the YAML parser, so that a value that is well-formed but wrong can be reported with its
//! line just as a syntax error can. Scalars keep their spelling: what `no`, `0x10` or `1_000` means is for the reader of the value to say.
//! Aliases share the node that they name instead of copying it, so a file of aliases that double each other takes no more memory than its text.

use std::{collections::HashMap, rc::Rc};

use granit_parser::{Event, Parser, ScalarStyle};

use super::error::{ConfigError, at_line};
use crate::sanitize;

/// More nested than any setting is; a deeper file is a mistake or an attack.
const MAX_DEPTH: usize = 16;

/// One value and the line it stands on (for an alias: the line of the alias).
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) value: Rc<Value>,
}

/// What a value can be.
#[derive(Debug)]
pub(super) enum Value {
    /// Nothing: an empty value, `~` or `null`.
    Null,
    /// Anything else that is neither a list nor a mapping, as it was spelled.
    Scalar(String),
    /// `[a, b]` or `- a` lines.
    List(Vec<Node>),
    /// `key: value` pairs; no key comes twice.
    Map(Vec<Entry>),
}

/// One `key: value` pair.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) line: usize,
    pub(super) node: Node,
}

impl Value {
    /// The kind of value in words, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "empty",
            Self::Scalar(_) => "a single value",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

/// Parses `text`, which must hold exactly one document. `None` when it holds nothing but comments.
pub(super) fn parse(text: &str) -> Result<Option<Node>, ConfigError> {
    let options = granit_parser::options! { disallow_directives: true, emit_comments: false };
    let mut builder = Builder {
        events: Parser::new_from_str_with_options(text, options),
        last_line: lines(text),
        anchors: HashMap::new(),
    };
    let mut root = None;
    loop {
        let (event, line) = builder.next()?;
        match event {
            Event::StreamEnd => return Ok(root),
            Event::DocumentStart(..) if root.is_some() => {
                return Err(at_line(
                    line,
                    "a second YAML document starts here",
                    "keep one document: remove the `---` line and what follows, or merge the two",
                ));
            }
            Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
            node => root = Some(builder.node(node, line, 0)?),
        }
    }
}

struct Builder<'input> {
    events: Parser<'input, granit_parser::StrInput<'input>>,
    last_line: usize,
    anchors: HashMap<usize, Node>,
}

impl<'input> Builder<'input> {
    /// The next event and its line. The parser may place what is not there, such as an absent value or end, behind the last line.
    fn next(&mut self) -> Result<(Event<'input>, usize), ConfigError> {
        match self.events.next() {
            Some(Ok((event, span))) => Ok((event, span.start.line().min(self.last_line))),
            Some(Err(error)) => Err(at_line(
                error.marker().line().min(self.last_line),
                format!("this is not valid YAML: {}", error.info()),
                "correct the syntax here or on a line next to it (indentation, tabs, quotes, brackets)",
            )),
            // The parser ends with StreamEnd, after which nobody asks.
            None => Ok((Event::StreamEnd, self.last_line)),
        }
    }

    fn node(
        &mut self,
        event: Event<'input>,
        line: usize,
        depth: usize,
    ) -> Result<Node, ConfigError> {
        if depth > MAX_DEPTH {
            return Err(at_line(
                line,
                format!("lists and mappings are nested more than {MAX_DEPTH} deep"),
                "no setting needs that; look for a stray indentation or bracket",
            ));
        }
        if let Some(tag) = event.tag() {
            return Err(at_line(
                line,
                format!("the YAML tag {} is not understood", shown(&tag.to_string())),
                "remove it",
            ));
        }
        let (anchor, value) = match event {
            Event::Alias(anchor) => return self.alias(anchor, line),
            Event::Scalar(text, style, anchor, _) => (anchor, scalar(&text, style)),
            Event::SequenceStart(_, anchor, _) => (anchor, self.list(depth)?),
            Event::MappingStart(_, anchor, _) => (anchor, self.map(depth)?),
            other => {
                return Err(at_line(
                    line,
                    format!("unexpected YAML ({other:?})"),
                    "write plain settings here",
                ));
            }
        };
        let node = Node {
            line,
            value: Rc::new(value),
        };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn alias(&self, anchor: usize, line: usize) -> Result<Node, ConfigError> {
        let named = self.anchors.get(&anchor).ok_or_else(|| {
            at_line(
                line,
                "this alias stands inside the value that it names",
                "write the value out instead",
            )
        })?;
        Ok(Node {
            line,
            value: Rc::clone(&named.value),
        })
    }

    fn list(&mut self, depth: usize) -> Result<Value, ConfigError> {
        let mut items = Vec::new();
        loop {
            let (event, line) = self.next()?;
            if matches!(event, Event::SequenceEnd) {
                return Ok(Value::List(items));
            }
            items.push(self.node(event, line, depth + 1)?);
        }
    }

    fn map(&mut self, depth: usize) -> Result<Value, ConfigError> {
        let mut entries = Vec::new();
        let mut lines = HashMap::new();
        loop {
            let (event, line) = self.next()?;
            if matches!(event, Event::MappingEnd) {
                return Ok(Value::Map(entries));
            }
            let key = match &*self.node(event, line, depth + 1)?.value {
                Value::Scalar(key) => key.clone(),
                other => {
                    return Err(at_line(
                        line,
                        format!("a key is a word, this one is {}", other.kind()),
                        "write `key: value`",
                    ));
                }
            };
            if let Some(first) = lines.insert(key.clone(), line) {
                return Err(at_line(
                    line,
                    format!("`{}` is given twice, first on line {first}", shown(&key)),
                    "keep one of the two",
                ));
            }
            let (event, value_line) = self.next()?;
            let mut node = self.node(event, value_line, depth + 1)?;
            if matches!(*node.value, Value::Null) {
                // The parser places an absent value where the next token is, which may be another line.
                node.line = line;
            }
            entries.push(Entry { key, line, node });
        }
    }
}

fn scalar(text: &str, style: ScalarStyle) -> Value {
    let null = style == ScalarStyle::Plain && matches!(text, "" | "~" | "null" | "Null" | "NULL");
    if null {
        Value::Null
    } else {
        Value::Scalar(text.to_owned())
    }
}

/// How many lines `text` has. As in YAML a carriage return alone ends one too.
fn lines(text: &str) -> usize {
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    text.lines().count().max(1)
}

/// `text` as it may stand in a message, not longer than a line of an error should be.
pub(super) fn shown(text: &str) -> String {
    sanitize::shown(text, 60)
}
