-- One database per server. Prefect's migrations need pg_trgm, which requires a superuser.
create database mlflow;
create database mlflow_auth;
create database prefect;
\connect prefect
create extension if not exists pg_trgm;
