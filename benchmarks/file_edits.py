"""Small files of code and edits of them, for `predicted_outputs.py`: written for it, two edits of each file."""

from dataclasses import dataclass

INVENTORY_PY = '''"""Stock of a small shop, kept in a JSON file."""

import json
from pathlib import Path


class OutOfStockError(Exception):
    """Fewer pieces are there than were asked for."""


class Inventory:
    """Articles by name, each with a number of pieces and of cents."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.articles = {}
        if path.exists():
            self.articles = json.loads(path.read_text())

    def add(self, name: str, pieces: int, cents: int) -> None:
        """Put pieces of an article on the shelf."""
        entry = self.articles.setdefault(name, {"pieces": 0, "cents": cents})
        entry["pieces"] += pieces
        entry["cents"] = cents

    def take(self, name: str, pieces: int) -> int:
        """Take pieces off the shelf; returns what they cost together."""
        entry = self.articles.get(name)
        if entry is None or entry["pieces"] < pieces:
            raise OutOfStockError(name)
        entry["pieces"] -= pieces
        return entry["cents"] * pieces

    def total_value(self) -> int:
        value = 0
        for entry in self.articles.values():
            value += entry["pieces"] * entry["cents"]
        return value

    def save(self) -> None:
        """Write everything to the file."""
        self.path.write_text(json.dumps(self.articles, indent=2))


def main() -> None:
    shop = Inventory(Path("shop.json"))
    shop.add("apple", 30, 45)
    shop.add("bread", 4, 320)
    print(shop.take("apple", 3))
    print(shop.total_value())
    shop.save()


if __name__ == "__main__":
    main()
'''

QUEUE_JS = """// A queue of jobs that run a few at a time.

class JobQueue {
  constructor(limit) {
    this.limit = limit;
    this.running = 0;
    this.waiting = [];
    this.finished = 0;
    this.failed = 0;
  }

  push(job) {
    return new Promise((resolve, reject) => {
      this.waiting.push({ job, resolve, reject });
      this.next();
    });
  }

  next() {
    if (this.running >= this.limit || this.waiting.length === 0) {
      return;
    }
    const { job, resolve, reject } = this.waiting.shift();
    this.running += 1;
    job()
      .then((value) => {
        this.finished += 1;
        resolve(value);
      })
      .catch((error) => {
        this.failed += 1;
        reject(error);
      })
      .finally(() => {
        this.running -= 1;
        this.next();
      });
  }

  summary() {
    return {
      running: this.running,
      waiting: this.waiting.length,
      finished: this.finished,
      failed: this.failed,
    };
  }
}

module.exports = { JobQueue };
"""

MATRIX_C = """#include <stdio.h>
#include <stdlib.h>

typedef struct {
    int rows;
    int columns;
    double *cells;
} Matrix;

Matrix matrix_new(int rows, int columns) {
    Matrix m;
    m.rows = rows;
    m.columns = columns;
    m.cells = calloc((size_t)rows * columns, sizeof(double));
    return m;
}

void matrix_free(Matrix *m) {
    free(m->cells);
    m->cells = NULL;
}

double matrix_get(const Matrix *m, int row, int column) {
    return m->cells[row * m->columns + column];
}

void matrix_set(Matrix *m, int row, int column, double value) {
    m->cells[row * m->columns + column] = value;
}

Matrix matrix_multiply(const Matrix *a, const Matrix *b) {
    Matrix product = matrix_new(a->rows, b->columns);
    for (int i = 0; i < a->rows; i++) {
        for (int j = 0; j < b->columns; j++) {
            double sum = 0.0;
            for (int k = 0; k < a->columns; k++) {
                sum += matrix_get(a, i, k) * matrix_get(b, k, j);
            }
            matrix_set(&product, i, j, sum);
        }
    }
    return product;
}

void matrix_print(const Matrix *m) {
    for (int i = 0; i < m->rows; i++) {
        for (int j = 0; j < m->columns; j++) {
            printf("%8.3f ", matrix_get(m, i, j));
        }
        printf("\\n");
    }
}
"""

WEATHER_PY = '''"""Weather reports from a folder of CSV files."""

import csv
import statistics
from pathlib import Path


def read_reports(folder):
    reports = []
    for path in sorted(Path(folder).glob("*.csv")):
        with path.open() as handle:
            for row in csv.DictReader(handle):
                reports.append(
                    {
                        "station": row["station"],
                        "day": row["day"],
                        "celsius": float(row["celsius"]),
                        "rain": float(row["rain"] or 0),
                    }
                )
    return reports


def by_station(reports):
    groups = {}
    for report in reports:
        groups.setdefault(report["station"], []).append(report)
    return groups


def warmest(reports):
    return max(reports, key=lambda report: report["celsius"])


def mean_rain(reports):
    return statistics.fmean(report["rain"] for report in reports)


def write_summary(reports, target):
    with open(target, "w") as handle:
        writer = csv.writer(handle)
        writer.writerow(["station", "days", "warmest", "rain"])
        for station, group in by_station(reports).items():
            best = warmest(group)
            writer.writerow([station, len(group), best["celsius"], round(mean_rain(group), 2)])


if __name__ == "__main__":
    write_summary(read_reports("reports"), "summary.csv")
'''

CART_TS = """export interface Item {
  id: string;
  title: string;
  cents: number;
  quantity: number;
}

export class Cart {
  private items: Item[] = [];

  addItem(item: Item): void {
    const found = this.items.find((other) => other.id === item.id);
    if (found) {
      found.quantity += item.quantity;
    } else {
      this.items.push({ ...item });
    }
  }

  removeItem(id: string): void {
    this.items = this.items.filter((item) => item.id !== id);
  }

  setQuantity(id: string, quantity: number): void {
    const found = this.items.find((item) => item.id === id);
    if (!found) {
      throw new Error(`no item ${id}`);
    }
    found.quantity = quantity;
  }

  subtotal(): number {
    return this.items.reduce((sum, item) => sum + item.cents * item.quantity, 0);
  }

  total(taxRate: number): number {
    return Math.round(this.subtotal() * (1 + taxRate));
  }

  isEmpty(): boolean {
    return this.items.length === 0;
  }

  toJSON(): string {
    return JSON.stringify({ items: this.items, subtotal: this.subtotal() });
  }
}
"""

CACHE_GO = """package cache

import (
	"sync"
	"time"
)

type entry struct {
	value   string
	expires time.Time
}

// Cache keeps strings for a while.
type Cache struct {
	mutex   sync.Mutex
	entries map[string]entry
	ttl     time.Duration
}

// New makes an empty cache.
func New(ttl time.Duration) *Cache {
	return &Cache{entries: make(map[string]entry), ttl: ttl}
}

// Get returns a value that has not expired.
func (c *Cache) Get(key string) (string, bool) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	found, ok := c.entries[key]
	if !ok || time.Now().After(found.expires) {
		delete(c.entries, key)
		return "", false
	}
	return found.value, true
}

// Set stores a value.
func (c *Cache) Set(key, value string) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.entries[key] = entry{value: value, expires: time.Now().Add(c.ttl)}
}

// Len counts entries, expired ones included.
func (c *Cache) Len() int {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return len(c.entries)
}
"""

TOKENS_PY = '''"""A calculator: text to tokens, tokens to a number."""

import re

PATTERN = re.compile(r"\\s*(?:(\\d+(?:\\.\\d+)?)|(.))")


class SyntaxProblem(Exception):
    pass


def tokenize(text):
    tokens = []
    for number, sign in PATTERN.findall(text):
        if number:
            tokens.append(("number", float(number)))
        elif sign.strip():
            tokens.append(("sign", sign))
    tokens.append(("end", None))
    return tokens


class Parser:
    def __init__(self, tokens):
        self.tokens = tokens
        self.index = 0

    def peek(self):
        return self.tokens[self.index]

    def advance(self):
        token = self.tokens[self.index]
        self.index += 1
        return token

    def expression(self):
        value = self.term()
        while self.peek() in (("sign", "+"), ("sign", "-")):
            _, sign = self.advance()
            right = self.term()
            value = value + right if sign == "+" else value - right
        return value

    def term(self):
        value = self.factor()
        while self.peek() in (("sign", "*"), ("sign", "/")):
            _, sign = self.advance()
            right = self.factor()
            value = value * right if sign == "*" else value / right
        return value

    def factor(self):
        kind, value = self.advance()
        if kind == "number":
            return value
        if value == "(":
            inner = self.expression()
            if self.advance() != ("sign", ")"):
                raise SyntaxProblem("a closing bracket is missing")
            return inner
        raise SyntaxProblem(f"unexpected {value!r}")


def evaluate(text):
    return Parser(tokenize(text)).expression()
'''

SERVICE_YAML = """version: "3.9"

services:
  api:
    image: registry.example.org/api:1.4
    restart: unless-stopped
    ports:
      - "8080:8080"
    environment:
      DATABASE_HOST: database
      DATABASE_PORT: "5432"
      DATABASE_NAME: shop
      LOG_LEVEL: info
    depends_on:
      - database
      - queue

  worker:
    image: registry.example.org/worker:1.4
    restart: unless-stopped
    environment:
      DATABASE_HOST: database
      DATABASE_PORT: "5432"
      DATABASE_NAME: shop
      QUEUE_HOST: queue
      LOG_LEVEL: info
    depends_on:
      - database
      - queue

  database:
    image: postgres:16
    restart: unless-stopped
    volumes:
      - database-data:/var/lib/postgresql/data
    environment:
      POSTGRES_DB: shop
      POSTGRES_PASSWORD: change-me

  queue:
    image: redis:7
    restart: unless-stopped
    volumes:
      - queue-data:/data

volumes:
  database-data:
  queue-data:
"""

REPORT_SQL = """-- Tables and reports of a library.

CREATE TABLE members (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    city TEXT NOT NULL,
    joined DATE NOT NULL
);

CREATE TABLE books (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    author TEXT NOT NULL,
    published INTEGER
);

CREATE TABLE loans (
    id INTEGER PRIMARY KEY,
    member_id INTEGER NOT NULL REFERENCES members (id),
    book_id INTEGER NOT NULL REFERENCES books (id),
    lent DATE NOT NULL,
    returned DATE
);

CREATE VIEW open_loans AS
SELECT loans.id, members.name, books.title, loans.lent
FROM loans
JOIN members ON members.id = loans.member_id
JOIN books ON books.id = loans.book_id
WHERE loans.returned IS NULL;

CREATE VIEW loans_by_city AS
SELECT members.city, COUNT(*) AS loans
FROM loans
JOIN members ON members.id = loans.member_id
GROUP BY members.city
ORDER BY loans DESC;

CREATE VIEW popular_books AS
SELECT books.title, books.author, COUNT(*) AS loans
FROM loans
JOIN books ON books.id = loans.book_id
GROUP BY books.id
HAVING COUNT(*) > 5
ORDER BY loans DESC;
"""

GRAPH_RS = """use std::collections::{HashMap, HashSet, VecDeque};

pub struct Graph {
    edges: HashMap<u32, Vec<u32>>,
}

impl Graph {
    pub fn new() -> Self {
        Graph { edges: HashMap::new() }
    }

    pub fn add_edge(&mut self, from: u32, to: u32) {
        self.edges.entry(from).or_insert_with(Vec::new).push(to);
        self.edges.entry(to).or_insert_with(Vec::new).push(from);
    }

    pub fn neighbours(&self, node: u32) -> &[u32] {
        match self.edges.get(&node) {
            Some(list) => list,
            None => &[],
        }
    }

    pub fn distance(&self, start: u32, goal: u32) -> Option<usize> {
        let mut seen = HashSet::new();
        let mut queue = VecDeque::new();
        queue.push_back((start, 0));
        seen.insert(start);
        while let Some((node, steps)) = queue.pop_front() {
            if node == goal {
                return Some(steps);
            }
            for &next in self.neighbours(node) {
                if seen.insert(next) {
                    queue.push_back((next, steps + 1));
                }
            }
        }
        None
    }

    pub fn node_count(&self) -> usize {
        self.edges.len()
    }
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEdit:
    """A file, and what is to be done to it."""

    name: str
    source: str
    instruction: str

    @property
    def prompt(self) -> str:
        """What a user asks."""
        return (
            f"{self.instruction} Answer with the whole file {self.name} and nothing else: no explanation, and no code "
            f"fence.\n\n{self.source}"
        )


def _edits(name: str, source: str, *instructions: str) -> tuple[FileEdit, ...]:
    return tuple(FileEdit(name=name, source=source, instruction=one) for one in instructions)


# One edit of every file, then the other one.
_PAIRS = (
    _edits(
        "inventory.py",
        INVENTORY_PY,
        "Rename the attribute articles to items everywhere.",
        "Add a docstring to the method total_value.",
    ),
    _edits(
        "queue.js",
        QUEUE_JS,
        "Rename the method push to enqueue.",
        "Add a method clear that empties this.waiting, after the method summary.",
    ),
    _edits(
        "matrix.c",
        MATRIX_C,
        "Add a comment of one line before each function.",
        "Rename the struct member cells to values everywhere.",
    ),
    _edits(
        "weather.py",
        WEATHER_PY,
        "Add a parameter encoding, by default 'utf-8', to read_reports and pass it to path.open.",
        "Rename the function warmest to hottest everywhere.",
    ),
    _edits(
        "cart.ts",
        CART_TS,
        "Rename the method removeItem to deleteItem.",
        "Add a method count that returns the sum of all quantities, after isEmpty.",
    ),
    _edits(
        "cache.go",
        CACHE_GO,
        "Add a method Delete that removes a key, after Set.",
        "Rename the field ttl to lifetime everywhere.",
    ),
    _edits(
        "calculator.py",
        TOKENS_PY,
        "Rename the class SyntaxProblem to ParseError everywhere.",
        "Add a docstring to each method of the class Parser.",
    ),
    _edits(
        "compose.yaml",
        SERVICE_YAML,
        "Change LOG_LEVEL from info to debug in all services.",
        "Rename the service database to postgres everywhere, in depends_on and DATABASE_HOST as well.",
    ),
    _edits(
        "library.sql",
        REPORT_SQL,
        "Add a column email TEXT to the table members, after name.",
        "Rename the table members to readers everywhere.",
    ),
    _edits(
        "graph.rs",
        GRAPH_RS,
        "Rename the function neighbours to adjacent everywhere.",
        "Add a doc comment to each public function.",
    ),
)
EDITS = tuple(pair[turn] for turn in (0, 1) for pair in _PAIRS)
